#pragma once
// What is known about weights: entries by the identity of the tensors that a weight is made of, found at each call.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "abi.h"
#include "inputs.h"

namespace {

using at::Tensor;
using RunFn = void (*)(const SparsecCall *, int64_t, int64_t);
using SizeFn = int64_t (*)(int64_t, int64_t);

// What a kernel reads of the weight: all of it, the columns that meet values of x, or the rows whose outputs are wanted.
enum Loop : int64_t { kAll, kSkip, kSelect };

// One range of M and the kernel that serves it. `pack` points into tensors that the Entry keeps alive, and is empty
// where the kernel reads the weight itself. `rounds_x`: the kernel quantises x by itself; others are given rows that are
// quantised already. `most`: of kSkip and kSelect, how many columns or rows may be left for it to be worth while.
struct Route {
  int64_t m_lo, m_hi;
  RunFn run, prepare;
  SizeFn prepare_units, scratch;
  std::vector<const void *> pack;
  const int64_t *work;
  int64_t tiles;
  bool rounds_x;
  Loop loop;
  int64_t most;
};

// How a convolution walks over an image; as ``Conv`` in facts.py.
struct Walk {
  int64_t kernel_high, kernel_wide, stride_high, stride_wide, above, below, left, right, dilation_high, dilation_wide;

  static Walk of(at::IntArrayRef n) {
    TORCH_CHECK(n.size() == 10, "sparsec: a walk has 10 integers");
    return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]};
  }
  bool pointwise() const {
    return kernel_high == 1 && kernel_wide == 1 && stride_high == 1 && stride_wide == 1 && !above && !below && !left &&
           !right;
  }
};

// A tensor as it was when it was looked at; held weakly, so that its address cannot be reused.
struct Part {
  c10::weak_intrusive_ptr<c10::TensorImpl> impl;
  const void *data;
  int64_t version;

  explicit Part(const Tensor &t) : impl(t.getIntrusivePtr()), data(t.const_data_ptr()), version(version_of(t)) {}

  static int64_t version_of(const Tensor &t) {
    return t.unsafeGetTensorImpl()->is_inference() ? 0 : static_cast<int64_t>(t._version());
  }
  bool is(const Tensor &t) const { return impl._unsafe_get_target() == t.unsafeGetTensorImpl() && !impl.expired(); }
  bool unchanged(const Tensor &t) const { return data == t.const_data_ptr() && version == version_of(t); }
};

// What activation sparsity brought: calls that were looked at, those that skipped, and in all of them the columns (or
// rows) that were left, of how many.
struct Meter {
  std::atomic<int64_t> calls{0}, skipped{0}, left{0}, of{0};

  void note(bool skips, int64_t count, int64_t whole) {
    calls.fetch_add(1, std::memory_order_relaxed);
    if (skips) skipped.fetch_add(1, std::memory_order_relaxed);
    left.fetch_add(count, std::memory_order_relaxed);
    of.fetch_add(whole, std::memory_order_relaxed);
  }
};

// What was decided for one weight under one plan. No route: dense. `retry_after` > 0: a weight that changes faster
// than packing pays is served dense for that many calls, whatever its version, and then looked at again.
// `parts`: the weight itself; or, where it is computed in the graph, what it is computed from (`codes`). `dense`: what
// they give, kept where some M runs dense.
struct Entry {
  std::vector<Part> parts;
  std::string plan;
  int64_t act, n, k, retry_after;
  bool transposed, verify, codes;
  at::ScalarType dtype;
  InputRule input;
  Walk walk{};  // of a convolution
  std::vector<Route> routes;
  std::vector<Tensor> keep;
  Tensor dense;
  mutable std::atomic<int64_t> uses{0};
  mutable Meter meter;

  Entry(at::TensorList tensors, std::string p) : parts(tensors.begin(), tensors.end()), plan(std::move(p)) {}

  bool made_of(at::TensorList tensors) const {
    if (tensors.size() != parts.size()) return false;
    for (size_t i = 0; i < parts.size(); ++i)
      if (!parts[i].is(tensors[i])) return false;
    return true;
  }
  bool fresh(at::TensorList tensors) const {
    if (!made_of(tensors)) return false;
    if (retry_after) return uses.load(std::memory_order_relaxed) < retry_after;
    for (size_t i = 0; i < parts.size(); ++i)
      if (!parts[i].unchanged(tensors[i])) return false;
    return true;
  }
  bool dead() const {
    for (const Part &part : parts)
      if (part.impl.expired()) return true;
    return false;
  }
  bool has(const void *impl) const {
    for (const Part &part : parts)
      if (part.impl._unsafe_get_target() == impl) return true;
    return false;
  }
  const Route *at(int64_t m, Loop loop = kAll) const {
    for (const Route &r : routes)
      if (r.loop == loop && r.m_lo <= m && m <= r.m_hi) return &r;
    return nullptr;
  }
};

std::shared_mutex table_mutex;
std::unordered_map<const void *, std::vector<std::shared_ptr<const Entry>>> table;  // by the first part

std::shared_ptr<const Entry> find(at::TensorList parts, c10::string_view plan) {
  std::shared_lock lock(table_mutex);
  auto it = table.find(parts[0].unsafeGetTensorImpl());
  if (it == table.end()) return nullptr;
  for (const auto &entry : it->second)
    if (entry->plan == plan && entry->fresh(parts)) return entry;
  return nullptr;
}

std::shared_ptr<const Entry> lookup(at::TensorList parts, c10::string_view plan) {
  auto entry = find(parts, plan);
  if (C10_UNLIKELY(!entry)) {
    static auto resolve = c10::Dispatcher::singleton()
                              .findSchemaOrThrow("sparsec::resolve", "")
                              .typed<void(at::TensorList, c10::string_view)>();
    resolve.call(parts, plan);
    entry = find(parts, plan);
    TORCH_CHECK(entry, "sparsec: the resolver installed nothing for this weight; please report this");
  }
  entry->uses.fetch_add(1, std::memory_order_relaxed);
  return entry;
}

// The weight of an entry in its floating dtype, as dense products need it.
Tensor weight_of(const Entry &e, at::TensorList parts) {
  if (!e.codes) return parts[0];
  if (e.dense.defined()) return e.dense;
  static auto compute = c10::Dispatcher::singleton()
                            .findSchemaOrThrow("sparsec::computed", "")
                            .typed<Tensor(at::TensorList, c10::string_view)>();
  return compute.call(parts, e.plan);
}

// ---------------------------------------------------------------------------------------------- installed by Python

// m_lo, m_hi, run, prepare, prepare_units, scratch, first tensor, tensors, tiles, rounds_x, loop, most
constexpr size_t kRouteInts = 12;

std::vector<Route> routes_from(at::TensorList tensors, at::IntArrayRef table) {
  TORCH_CHECK(table.size() % kRouteInts == 0, "sparsec: a route has ", kRouteInts, " integers");
  std::vector<Route> routes;
  for (size_t i = 0; i < table.size(); i += kRouteInts) {
    const int64_t *t = table.data() + i;
    Route r{t[0], t[1], reinterpret_cast<RunFn>(t[2]), reinterpret_cast<RunFn>(t[3]), reinterpret_cast<SizeFn>(t[4]),
            reinterpret_cast<SizeFn>(t[5]), {}, nullptr, t[8], t[9] != 0, static_cast<Loop>(t[10]), t[11]};
    for (int64_t j = t[6]; j < t[6] + t[7]; ++j) r.pack.push_back(tensors[j].const_data_ptr());
    r.work = tensors[t[6] + t[7]].const_data_ptr<int64_t>();  // the prefix sums follow the packed tensors
    routes.push_back(std::move(r));
  }
  return routes;
}

// `facts`: act, transposed, verify, n, k, retry_after, codes, bf16, kind of the input rule, and of a convolution the
// numbers of its Walk. `dense`: see Entry.
void install(at::TensorList parts, c10::string_view plan, at::IntArrayRef facts, double x_scale,
             at::TensorList tensors, at::IntArrayRef routes, const std::optional<Tensor> &dense) {
  auto entry = std::make_shared<Entry>(parts, std::string(plan));
  entry->act = facts[0], entry->transposed = facts[1], entry->verify = facts[2];
  entry->n = facts[3], entry->k = facts[4], entry->retry_after = facts[5], entry->codes = facts[6];
  entry->dtype = facts[7] ? at::kBFloat16 : at::kFloat;
  entry->input = InputRule{static_cast<InputRule::Kind>(facts[8]), static_cast<float>(x_scale)};
  if (facts.size() > 9) entry->walk = Walk::of(facts.slice(9));
  entry->keep.assign(tensors.begin(), tensors.end());
  entry->routes = routes_from(tensors, routes);
  if (dense) entry->dense = *dense;
  std::unique_lock lock(table_mutex);
  auto &entries = table[parts[0].unsafeGetTensorImpl()];
  std::erase_if(entries, [&](const auto &old) { return old->dead() || (old->plan == plan && old->made_of(parts)); });
  entries.push_back(std::move(entry));
}

// Drop what is known about weights made of the tensor at this address; returns how often they were used. Entries that
// a running call holds live until it ends.
int64_t forget(int64_t impl) {
  std::unique_lock lock(table_mutex);
  int64_t uses = 0;
  for (auto it = table.begin(); it != table.end();) {
    std::erase_if(it->second, [&](const auto &entry) {
      bool gone = entry->has(reinterpret_cast<const void *>(impl));
      if (gone) uses += entry->uses.load();
      return gone;
    });
    it = it->second.empty() ? table.erase(it) : std::next(it);
  }
  return uses;
}

// Of every weight whose activations were looked at: its plan, and four numbers of its meter.
std::tuple<std::vector<std::string>, std::vector<int64_t>> meters() {
  std::shared_lock lock(table_mutex);
  std::vector<std::string> plans;
  std::vector<int64_t> numbers;
  for (const auto &[_, entries] : table)
    for (const auto &entry : entries) {
      const Meter &m = entry->meter;
      if (!m.calls.load()) continue;
      plans.push_back(entry->plan);
      for (const auto *n : {&m.calls, &m.skipped, &m.left, &m.of}) numbers.push_back(n->load());
    }
  return {plans, numbers};
}

int64_t uses(int64_t impl, c10::string_view plan) {
  std::shared_lock lock(table_mutex);
  auto it = table.find(reinterpret_cast<const void *>(impl));
  if (it == table.end()) return -1;
  for (const auto &entry : it->second)
    if (entry->plan == plan) return entry->uses.load();
  return -1;
}

}  // namespace
