// The ops that stand in a compiled graph: sparsec::linear, ::linear_group, ::conv1x1.
//
// A call receives the original weight and finds what was decided for it by identity: TensorImpl (held weakly, so that
// its address cannot be reused), data pointer and version. A weight that is not known, or has changed, is handed to
// Python once (sparsec::resolve), which installs an Entry. Everything that cannot be served here runs dense, with the
// same ATen kernels that Inductor would have called. Kernels are plain C functions (codegen/cpp/abi.h); threads are
// torch's own.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "abi.h"

namespace {

using at::Tensor;
using RunFn = void (*)(const SparsecCall *, int64_t, int64_t);
using SizeFn = int64_t (*)(int64_t, int64_t);

enum Act : int64_t { kNone, kRelu, kGelu, kGeluTanh, kSilu };

// One range of M and the kernel that serves it. `pack` points into tensors that the Entry keeps alive.
struct Route {
  int64_t m_lo, m_hi;
  RunFn run, prepare;
  SizeFn prepare_units, scratch;
  std::vector<const void *> pack;
  const int64_t *work;
  int64_t tiles;
};

// What was decided for one weight under one plan. No route: dense. `retry_after` > 0: a weight that changes faster
// than packing pays is served dense for that many calls, whatever its version, and then looked at again.
struct Entry {
  c10::weak_intrusive_ptr<c10::TensorImpl> weight;
  const void *data;
  int64_t version;
  std::string plan;
  int64_t act, n, k, retry_after;
  bool transposed, verify;
  std::vector<Route> routes;
  std::vector<Tensor> keep;
  mutable std::atomic<int64_t> uses{0};

  Entry(const Tensor &w, std::string p)
      : weight(w.getIntrusivePtr()), data(w.const_data_ptr()), version(version_of(w)), plan(std::move(p)) {}

  static int64_t version_of(const Tensor &w) {
    return w.unsafeGetTensorImpl()->is_inference() ? 0 : static_cast<int64_t>(w._version());
  }
  bool fresh(const Tensor &w) const {
    if (weight.expired()) return false;
    if (retry_after) return uses.load(std::memory_order_relaxed) < retry_after;
    return data == w.const_data_ptr() && version == version_of(w);
  }
  const Route *at(int64_t m) const {
    for (const Route &r : routes)
      if (r.m_lo <= m && m <= r.m_hi) return &r;
    return nullptr;
  }
};

std::shared_mutex table_mutex;
std::unordered_map<const void *, std::vector<std::shared_ptr<const Entry>>> table;

std::shared_ptr<const Entry> find(const Tensor &w, c10::string_view plan) {
  std::shared_lock lock(table_mutex);
  auto it = table.find(w.unsafeGetTensorImpl());
  if (it == table.end()) return nullptr;
  for (const auto &entry : it->second)
    if (entry->plan == plan && entry->fresh(w)) return entry;
  return nullptr;
}

std::shared_ptr<const Entry> lookup(const Tensor &w, c10::string_view plan) {
  auto entry = find(w, plan);
  if (C10_UNLIKELY(!entry)) {
    static auto resolve = c10::Dispatcher::singleton()
                              .findSchemaOrThrow("sparsec::resolve", "")
                              .typed<void(const Tensor &, c10::string_view)>();
    resolve.call(w, plan);
    entry = find(w, plan);
    TORCH_CHECK(entry, "sparsec: the resolver installed nothing for this weight; please report this");
  }
  entry->uses.fetch_add(1, std::memory_order_relaxed);
  return entry;
}

// ---------------------------------------------------------------------------------------------------------- dense

Tensor activate(Tensor y, int64_t act) {
  switch (act) {
    case kRelu: return at::relu_(y);
    case kGelu: return at::gelu_(y, "none");
    case kGeluTanh: return at::gelu_(y, "tanh");
    case kSilu: return at::silu_(y);
    default: return y;
  }
}

Tensor dense_rows(const Tensor &rows, const Tensor &w, const std::optional<Tensor> &b, const Entry &e) {
  Tensor wt = e.transposed ? w : (w.dim() == 2 ? w : w.reshape({e.n, e.k})).t();
  Tensor y = b && b->defined() ? at::cpu::addmm(*b, rows, wt) : at::cpu::mm(rows, wt);
  return activate(std::move(y), e.act);
}

// --------------------------------------------------------------------------------------------------------- sparse

// One kernel call that is ready to run: `call` holds pointers that `rows`, `y` and `scratch` keep alive.
struct Job {
  const Route *route = nullptr;
  SparsecCall call{};
  Tensor scratch;
};

Job make_job(const Route &route, int64_t act, const Tensor &rows, const std::optional<Tensor> &b, Tensor &y) {
  Job job;
  job.route = &route;
  SparsecCall &c = job.call;
  c.m = rows.size(0), c.k = rows.size(1), c.n = y.size(1);
  c.x = rows.const_data_ptr(), c.x_stride = rows.stride(0);
  c.y = y.mutable_data_ptr(), c.y_stride = y.stride(0);
  c.bias = b && b->defined() ? b->const_data_ptr() : nullptr;
  c.pack = route.pack.data();
  c.act = static_cast<int32_t>(act);
  if (int64_t bytes = route.scratch(c.m, c.k)) {
    job.scratch = at::empty({bytes}, rows.options().dtype(at::kByte));
    c.scratch = job.scratch.mutable_data_ptr();
  }
  return job;
}

// Less work than this (kept weights times rows, about) is done before another thread has woken up.
constexpr int64_t kSerial = 1 << 15;

int64_t thread_count(int64_t cost) {
  if (cost < kSerial || at::in_parallel_region()) return 1;
  return at::get_num_threads();
}

void prepare(Job &job) {
  int64_t units = job.route->prepare_units(job.call.m, job.call.k);
  if (!units) return;
  int64_t threads = std::min(units, thread_count(job.call.m * job.call.k));
  if (threads <= 1) return job.route->prepare(&job.call, 0, units);
  at::parallel_for(0, threads, 1, [&](int64_t t0, int64_t t1) {
    job.route->prepare(&job.call, units * t0 / threads, units * t1 / threads);
  });
}

// First tile of share t of `threads`, so that shares cost alike.
int64_t share(const Route &r, int64_t t, int64_t threads) {
  int64_t goal = r.work[r.tiles] / threads * t + r.work[r.tiles] % threads * t / threads;
  return t >= threads ? r.tiles : std::lower_bound(r.work, r.work + r.tiles, goal) - r.work;
}

// All jobs in one parallel region; they read the same x.
void run(std::vector<Job> &jobs) {
  int64_t cost = 0;
  for (Job &job : jobs) {
    prepare(job);
    cost += job.call.m * job.route->work[job.route->tiles];
  }
  int64_t threads = thread_count(cost);
  if (threads <= 1) {
    for (Job &job : jobs) job.route->run(&job.call, 0, job.route->tiles);
    return;
  }
  at::parallel_for(0, threads, 1, [&](int64_t t0, int64_t t1) {
    for (Job &job : jobs) {
      int64_t begin = share(*job.route, t0, threads), end = share(*job.route, t1, threads);
      if (begin < end) job.route->run(&job.call, begin, end);
    }
  });
}

// x as [M, K] with unit inner stride; a copy only where strides demand one.
Tensor as_rows(const Tensor &x) {
  int64_t k = x.size(-1);
  if (x.dim() == 2) return x.stride(1) == 1 || k <= 1 ? x : x.contiguous();
  return x.reshape({x.numel() == 0 ? c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)) : -1, k}).contiguous();
}

Tensor shaped(Tensor y, const Tensor &x) {
  if (x.dim() == 2) return y;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = y.size(1);
  return y.view(sizes);
}

void verify(const Entry &e, const Tensor &rows, const Tensor &w, const std::optional<Tensor> &b, const Tensor &y) {
  if (!e.verify) return;
  static auto check = c10::Dispatcher::singleton()
                          .findSchemaOrThrow("sparsec::verify", "")
                          .typed<void(const Tensor &, const Tensor &, const std::optional<Tensor> &, const Tensor &,
                                      c10::string_view)>();
  check.call(rows, w, b, y, e.plan);
}

void check_shapes(const Tensor &x, const Tensor &w, const Entry &e) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == e.k, "sparsec::linear: x has ", x.size(-1), " columns, the weight ", e.k);
  TORCH_CHECK(x.scalar_type() == w.scalar_type(), "sparsec::linear: x is ", x.scalar_type(), ", the weight ",
              w.scalar_type());
}

Tensor rows_through(const Entry &e, const Tensor &rows, const Tensor &w, const std::optional<Tensor> &b) {
  const Route *route = e.at(rows.size(0));
  Tensor y;
  if (!route) {
    y = dense_rows(rows, w, b, e);
  } else {
    y = at::empty({rows.size(0), e.n}, rows.options());
    std::vector<Job> jobs;
    jobs.push_back(make_job(*route, e.act, rows, b, y));
    run(jobs);
  }
  verify(e, rows, w, b, y);
  return y;
}

Tensor linear(const Tensor &x, const Tensor &w, const std::optional<Tensor> &b, c10::string_view plan) {
  at::AutoDispatchBelowADInplaceOrView guard;  // inference only: no autograd bookkeeping for the calls inside
  auto entry = lookup(w, plan);
  check_shapes(x, w, *entry);
  if (x.dim() == 1) return rows_through(*entry, x.unsqueeze(0).contiguous(), w, b).squeeze(0);
  return shaped(rows_through(*entry, as_rows(x), w, b), x);
}

std::vector<Tensor> linear_group(const Tensor &x, at::TensorList weights, const c10::List<std::optional<Tensor>> &biases,
                                 const std::vector<std::string> &plans) {
  at::AutoDispatchBelowADInplaceOrView guard;  // inference only: no autograd bookkeeping for the calls inside
  Tensor rows = as_rows(x.dim() == 1 ? x.unsqueeze(0) : x);
  int64_t m = rows.size(0);
  std::vector<std::shared_ptr<const Entry>> entries;
  std::vector<Tensor> ys(weights.size());
  std::vector<Job> jobs;
  jobs.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    entries.push_back(lookup(weights[i], plans[i]));
    const Entry &e = *entries[i];
    check_shapes(x, weights[i], e);
    const Route *route = e.at(m);
    if (!route) continue;
    ys[i] = at::empty({m, e.n}, rows.options());
    jobs.push_back(make_job(*route, e.act, rows, biases.get(i), ys[i]));
  }
  run(jobs);
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::optional<Tensor> b = biases.get(i);
    if (!ys[i].defined()) ys[i] = dense_rows(rows, weights[i], b, *entries[i]);
    verify(*entries[i], rows, weights[i], b, ys[i]);
    ys[i] = x.dim() == 1 ? ys[i].squeeze(0) : shaped(std::move(ys[i]), x);
  }
  return ys;
}

// x [B, C, H, W], w [N, C, 1, 1]. The memory format of the result is that of x.
Tensor conv1x1(const Tensor &x, const Tensor &w, const std::optional<Tensor> &b, c10::string_view plan) {
  at::AutoDispatchBelowADInplaceOrView guard;  // inference only: no autograd bookkeeping for the calls inside
  auto entry = lookup(w, plan);
  bool last = !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
  auto format = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  int64_t m = x.size(0) * x.size(2) * x.size(3);
  if (!entry->at(m)) return activate(at::conv2d(x, w, b), entry->act).contiguous(format);
  Tensor rows = x.permute({0, 2, 3, 1}).reshape({m, x.size(1)}).contiguous();
  Tensor y = rows_through(*entry, rows, w, b).view({x.size(0), x.size(2), x.size(3), entry->n});
  return y.permute({0, 3, 1, 2}).contiguous(format);
}

// ---------------------------------------------------------------------------------------------- installed by Python

constexpr size_t kRouteInts = 9;  // m_lo, m_hi, run, prepare, prepare_units, scratch, first tensor, tensors, tiles

std::vector<Route> routes_from(at::TensorList tensors, at::IntArrayRef table) {
  TORCH_CHECK(table.size() % kRouteInts == 0, "sparsec: a route has ", kRouteInts, " integers");
  std::vector<Route> routes;
  for (size_t i = 0; i < table.size(); i += kRouteInts) {
    const int64_t *t = table.data() + i;
    Route r{t[0], t[1], reinterpret_cast<RunFn>(t[2]), reinterpret_cast<RunFn>(t[3]), reinterpret_cast<SizeFn>(t[4]),
            reinterpret_cast<SizeFn>(t[5]), {}, nullptr, t[8]};
    for (int64_t j = t[6]; j < t[6] + t[7]; ++j) r.pack.push_back(tensors[j].const_data_ptr());
    r.work = tensors[t[6] + t[7]].const_data_ptr<int64_t>();  // the prefix sums follow the packed tensors
    routes.push_back(std::move(r));
  }
  return routes;
}

// `facts`: act, transposed, verify, n, k, retry_after.
void install(const Tensor &w, c10::string_view plan, at::IntArrayRef facts, at::TensorList tensors,
             at::IntArrayRef routes) {
  auto entry = std::make_shared<Entry>(w, std::string(plan));
  entry->act = facts[0], entry->transposed = facts[1], entry->verify = facts[2];
  entry->n = facts[3], entry->k = facts[4], entry->retry_after = facts[5];
  entry->keep.assign(tensors.begin(), tensors.end());
  entry->routes = routes_from(tensors, routes);
  std::unique_lock lock(table_mutex);
  auto &entries = table[w.unsafeGetTensorImpl()];
  std::erase_if(entries, [&](const auto &old) { return old->plan == plan || old->weight.expired(); });
  entries.push_back(std::move(entry));
}

// Drop what is known about the weight at this address; returns how often it was used. Entries that a running call
// holds live until it ends.
int64_t forget(int64_t impl) {
  std::unique_lock lock(table_mutex);
  auto it = table.find(reinterpret_cast<const void *>(impl));
  if (it == table.end()) return 0;
  int64_t uses = 0;
  for (const auto &entry : it->second) uses += entry->uses.load();
  table.erase(it);
  return uses;
}

int64_t uses(int64_t impl, c10::string_view plan) {
  std::shared_lock lock(table_mutex);
  auto it = table.find(reinterpret_cast<const void *>(impl));
  if (it == table.end()) return -1;
  for (const auto &entry : it->second)
    if (entry->plan == plan) return entry->uses.load();
  return -1;
}

// One kernel on one packed weight, without a table: for tuning and tests.
Tensor direct(const Tensor &x, const std::optional<Tensor> &b, at::TensorList tensors, at::IntArrayRef route,
              int64_t n, int64_t act) {
  auto routes = routes_from(tensors, route);
  Tensor rows = as_rows(x);
  Tensor y = at::empty({rows.size(0), n}, rows.options());
  std::vector<Job> jobs;
  jobs.push_back(make_job(routes.at(0), act, rows, b, y));
  run(jobs);
  return shaped(std::move(y), x);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparsec, lib) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};
  lib.def("linear(Tensor x, Tensor weight, Tensor? bias, str plan) -> Tensor", tags);
  lib.def("linear_group(Tensor x, Tensor[] weights, Tensor?[] biases, str[] plans) -> Tensor[]", tags);
  lib.def("conv1x1(Tensor x, Tensor weight, Tensor? bias, str plan) -> Tensor", tags);
  lib.def("resolve(Tensor weight, str plan) -> ()");
  lib.def("verify(Tensor x, Tensor weight, Tensor? bias, Tensor y, str plan) -> ()");
  lib.def("install(Tensor weight, str plan, int[] facts, Tensor[] tensors, int[] routes) -> ()");
  lib.def("forget(int impl) -> int", forget);
  lib.def("uses(int impl, str plan) -> int", uses);
  lib.def("direct(Tensor x, Tensor? bias, Tensor[] tensors, int[] route, int n, int act) -> Tensor");
}

TORCH_LIBRARY_IMPL(sparsec, CPU, lib) {
  lib.impl("linear", linear);
  lib.impl("linear_group", linear_group);
  lib.impl("conv1x1", conv1x1);
  lib.impl("install", install);
  lib.impl("direct", direct);
}

#include "packed.h"
