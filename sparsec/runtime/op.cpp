// The ops that stand in a compiled graph: sparsec::linear, ::linear_codes, ::linear_group, ::conv2d (conv.h).
//
// A call receives the original weight, or the tensors that it is computed from, and finds what was decided for it by
// identity (table.h): TensorImpl, data pointer and version. A weight that is not known, or has changed, is handed to
// Python once (sparsec::resolve), which installs an Entry. Everything that cannot be served here runs dense, with the
// same ATen kernels that Inductor would have called. Where the plan says that x is quantised, x is what it was before.
// Kernels are plain C functions (codegen/cpp/abi.h); threads are torch's own.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "active.h"
#include "table.h"

namespace {

enum Act : int64_t { kNone, kRelu, kGelu, kGeluTanh, kSilu };

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

// `rows` as the product needs them, `w` [N, K] (or [K, N], or of a convolution [N, K, 1, 1]).
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
  const void *own = nullptr;  // the pack of a kernel that reads the weight itself
  int64_t tiles = 0, cost = 0;
};

Job make_job(const Route &route, int64_t act, const Tensor &rows, const std::optional<Tensor> &b, Tensor &y,
             float x_scale = 0) {
  Job job;
  job.route = &route;
  SparsecCall &c = job.call;
  c.m = rows.size(0), c.k = rows.size(1), c.n = y.size(1);
  c.x = rows.const_data_ptr(), c.x_stride = rows.stride(0);
  c.y = y.mutable_data_ptr(), c.y_stride = y.stride(0);
  c.bias = b && b->defined() ? b->const_data_ptr() : nullptr;
  c.pack = route.pack.data();
  c.act = static_cast<int32_t>(act);
  c.x_scale = x_scale;
  job.tiles = route.tiles, job.cost = c.m * route.work[route.tiles];
  if (int64_t bytes = route.scratch(c.m, c.k)) {
    job.scratch = at::empty({bytes}, rows.options().dtype(at::kByte));
    c.scratch = job.scratch.mutable_data_ptr();
  }
  return job;
}

// The job on a part of the weight: `active` columns of it, or rows.
void narrow(Job &job, const Active &active) {
  const Route &route = *job.route;
  int64_t whole = route.loop == kSkip ? job.call.k : job.call.n;
  job.call.active = active.data(), job.call.active_count = active.count;
  job.cost = static_cast<int64_t>(static_cast<double>(job.cost) * active.count / std::max<int64_t>(whole, 1));
  if (route.loop == kSelect) job.tiles = (active.count + 15) / 16;
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
int64_t share(const Job &job, int64_t t, int64_t threads) {
  const Route &r = *job.route;
  if (r.loop == kSelect) return job.tiles * t / threads;
  int64_t goal = r.work[r.tiles] / threads * t + r.work[r.tiles] % threads * t / threads;
  return t >= threads ? r.tiles : std::lower_bound(r.work, r.work + r.tiles, goal) - r.work;
}

// All jobs in one parallel region.
void run(std::vector<Job> &jobs) {
  int64_t cost = 0;
  for (Job &job : jobs) {
    prepare(job);
    if (job.own) job.call.pack = &job.own;
    cost += job.cost;
  }
  int64_t threads = thread_count(cost);
  if (threads <= 1) {
    for (Job &job : jobs) job.route->run(&job.call, 0, job.tiles);
    return;
  }
  at::parallel_for(0, threads, 1, [&](int64_t t0, int64_t t1) {
    for (Job &job : jobs) {
      int64_t begin = share(job, t0, threads), end = share(job, t1, threads);
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

void verify(const Entry &e, const Tensor &rows, const Tensor &weight, const std::optional<Tensor> &b, const Tensor &y,
            const InputRule &rule) {
  if (!e.verify || !rule.sane()) return;
  static auto check = c10::Dispatcher::singleton()
                          .findSchemaOrThrow("sparsec::verify", "")
                          .typed<void(const Tensor &, const Tensor &, const std::optional<Tensor> &, const Tensor &,
                                      c10::string_view, double)>();
  check.call(rows, weight, b, y, e.plan, rule.code());
}
void verify(const Entry &e, const Tensor &rows, at::TensorList parts, const std::optional<Tensor> &b, const Tensor &y,
            const InputRule &rule) {
  if (e.verify) verify(e, rows, weight_of(e, parts), b, y, rule);
}

void check_shapes(const Tensor &x, const Tensor &w, const Entry &e) {
  auto dtype = e.codes ? e.dtype : w.scalar_type();
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == e.k, "sparsec::linear: x has ", x.size(-1), " columns, the weight ", e.k);
  TORCH_CHECK(x.scalar_type() == dtype, "sparsec::linear: x is ", x.scalar_type(), ", the weight ", dtype);
}

// One weight's way through a call: its rule for x, and the kernel that serves these rows (null: dense).
struct Way {
  InputRule rule;
  const Route *route;

  Way(const Entry &e, const std::optional<Tensor> &x_scale, int64_t m) : rule(e.input.with(x_scale)) {
    route = rule.sane() ? e.at(m) : nullptr;
  }
  bool rounds_here() const { return !rule.raw() && !(route && route->rounds_x); }

  // Takes the kernel that skips columns, where there is one and these rows have zeros enough. `active`: what they leave,
  // found once (`looked`) for all weights that read them.
  void skip(const Entry &e, const Tensor &rows, Active &active, bool &looked) {
    const Route *skips = rule.sane() && rows.size(0) <= kMostActiveRows ? e.at(rows.size(0), kSkip) : nullptr;
    if (!skips) return;
    if (!looked) active = active_columns(rows), looked = true;
    e.meter.note(active.count <= skips->most, active.count, e.k);
    if (active.count <= skips->most) route = skips;
  }
};

Tensor rows_through(const Entry &e, const Tensor &rows, at::TensorList parts, const std::optional<Tensor> &b,
                    const std::optional<Tensor> &x_scale) {
  Way way(e, x_scale, rows.size(0));
  Active active;
  bool looked = false;
  way.skip(e, rows, active, looked);
  Tensor read = way.rounds_here() ? quantised_rows(rows, way.rule) : rows;
  Tensor y;
  if (!way.route) {
    y = dense_rows(read, weight_of(e, parts), b, e);
  } else {
    y = at::empty({rows.size(0), e.n}, rows.options());
    std::vector<Job> jobs;
    jobs.push_back(make_job(*way.route, e.act, read, b, y, way.rule.code()));
    if (way.route->loop == kSkip) narrow(jobs[0], active);
    run(jobs);
  }
  verify(e, rows, parts, b, y, way.rule);
  return y;
}

// Only the outputs in whose place some row of `needed` [M, N] holds no zero; what else y holds is nobody's business.
Tensor needed_through(const Entry &e, const Tensor &rows, const Tensor &needed, at::TensorList parts,
                      const std::optional<Tensor> &b, const std::optional<Tensor> &x_scale) {
  const Route *route = rows.size(0) <= kMostActiveRows ? e.at(rows.size(0), kSelect) : nullptr;
  InputRule rule = e.input.with(x_scale);
  bool own = route && route->pack.empty();  // the kernel reads the weight itself, row after row without gaps
  if (!route || !rule.sane() || (own && !parts[0].is_contiguous())) return rows_through(e, rows, parts, b, x_scale);
  Active active = active_columns(needed);
  // Zero times what an infinity gives is NaN, which must come out.
  bool skips = active.count <= route->most && all_finite(rows);
  if (skips || !e.at(rows.size(0), kSkip)) e.meter.note(skips, active.count, e.n);  // else rows_through notes the call
  if (!skips) return rows_through(e, rows, parts, b, x_scale);
  Tensor read = rule.raw() ? rows : quantised_rows(rows, rule);
  Tensor y = at::zeros({rows.size(0), e.n}, rows.options());
  std::vector<Job> jobs;
  jobs.push_back(make_job(*route, e.act, read, b, y));
  if (own) jobs[0].own = parts[0].const_data_ptr();
  narrow(jobs[0], active);
  run(jobs);
  if (e.verify && active.count) {
    Tensor list = active.list.narrow(0, 0, active.count);
    Tensor bias = b && b->defined() ? b->index_select(0, list) : Tensor();
    verify(e, rows, weight_of(e, parts).index_select(0, list), bias.defined() ? std::optional(bias) : std::nullopt,
           y.index_select(1, list), rule);
  }
  return y;
}

Tensor linear_of(const Tensor &x, at::TensorList parts, const std::optional<Tensor> &b, c10::string_view plan,
                 const std::optional<Tensor> &x_scale) {
  at::AutoDispatchBelowADInplaceOrView guard;  // inference only: no autograd bookkeeping for the calls inside
  auto entry = lookup(parts, plan);
  check_shapes(x, parts[0], *entry);
  if (x.dim() == 1) return rows_through(*entry, x.unsqueeze(0).contiguous(), parts, b, x_scale).squeeze(0);
  return shaped(rows_through(*entry, as_rows(x), parts, b, x_scale), x);
}

Tensor linear(const Tensor &x, const Tensor &w, const std::optional<Tensor> &b, c10::string_view plan,
              const std::optional<Tensor> &x_scale) {
  return linear_of(x, w, b, plan, x_scale);
}

// As linear, where nobody reads the outputs that meet only zeros of `needed` [..., N].
Tensor linear_needed(const Tensor &x, at::TensorList parts, const std::optional<Tensor> &b, const Tensor &needed,
                     c10::string_view plan, const std::optional<Tensor> &x_scale) {
  at::AutoDispatchBelowADInplaceOrView guard;  // inference only: no autograd bookkeeping for the calls inside
  auto entry = lookup(parts, plan);
  check_shapes(x, parts[0], *entry);
  TORCH_CHECK(needed.dim() >= 1 && needed.size(-1) == entry->n, "sparsec::linear_needed: there are ", entry->n,
              " outputs, and what says which are needed is ", needed.sizes());
  bool one = x.dim() == 1;
  auto kind = needed.scalar_type();
  bool known = kind == at::kFloat || kind == at::kBFloat16 || kind == at::kBool;
  Tensor wanted = known ? needed : needed.ne(0);  // [.., N], or [N] for all rows
  Tensor y = needed_through(*entry, as_rows(one ? x.unsqueeze(0) : x), as_rows(wanted.dim() == 1 ? wanted.unsqueeze(0) : wanted),
                            parts, b, x_scale);
  return one ? y.squeeze(0) : shaped(std::move(y), x);
}

// The weight is computed from `codes` (integers, scales, zero points), as the plan says.
Tensor linear_codes(const Tensor &x, at::TensorList codes, const std::optional<Tensor> &b, c10::string_view plan,
                    const std::optional<Tensor> &x_scale) {
  return linear_of(x, codes, b, plan, x_scale);
}

// Rows quantised by each rule that a group has, once.
struct Rounded {
  std::vector<std::pair<InputRule, Tensor>> made;

  const Tensor &of(const Tensor &rows, const InputRule &rule) {
    for (auto &[known, tensor] : made)
      if (known == rule) return tensor;
    return made.emplace_back(rule, quantised_rows(rows, rule)).second;
  }
};

// Several linears on one x. `parts`: what each weight is made of, one after the other, `counts` of each.
std::vector<Tensor> linear_group(const Tensor &x, at::TensorList parts, at::IntArrayRef counts,
                                 const c10::List<std::optional<Tensor>> &biases, const std::vector<std::string> &plans,
                                 const c10::List<std::optional<Tensor>> &x_scales) {
  at::AutoDispatchBelowADInplaceOrView guard;  // inference only: no autograd bookkeeping for the calls inside
  Tensor rows = as_rows(x.dim() == 1 ? x.unsqueeze(0) : x);
  int64_t m = rows.size(0);
  std::vector<std::shared_ptr<const Entry>> entries;
  std::vector<at::TensorList> weights;
  std::vector<Way> ways;
  std::vector<Tensor> ys(plans.size()), reads(plans.size());
  std::vector<Job> jobs;
  Rounded rounded;
  Active active;
  bool looked = false;
  jobs.reserve(plans.size());
  TORCH_CHECK(counts.size() == plans.size() && biases.size() == plans.size() && x_scales.size() == plans.size() &&
                  c10::sum_integers(counts) == static_cast<int64_t>(parts.size()),
              "sparsec::linear_group: its lists do not fit together");
  for (size_t i = 0, first = 0; i < plans.size(); first += counts[i++]) {
    weights.push_back(parts.slice(first, counts[i]));
    entries.push_back(lookup(weights[i], plans[i]));
    const Entry &e = *entries[i];
    check_shapes(x, weights[i][0], e);
    Way &way = ways.emplace_back(e, x_scales.get(i), m);
    way.skip(e, rows, active, looked);
    reads[i] = way.rounds_here() ? rounded.of(rows, way.rule) : rows;
    if (!way.route) continue;
    ys[i] = at::empty({m, e.n}, rows.options());
    jobs.push_back(make_job(*way.route, e.act, reads[i], biases.get(i), ys[i], way.rule.code()));
    if (way.route->loop == kSkip) narrow(jobs.back(), active);
  }
  run(jobs);
  for (size_t i = 0; i < plans.size(); ++i) {
    const std::optional<Tensor> b = biases.get(i);
    if (!ys[i].defined()) ys[i] = dense_rows(reads[i], weight_of(*entries[i], weights[i]), b, *entries[i]);
    verify(*entries[i], rows, weights[i], b, ys[i], ways[i].rule);
    ys[i] = x.dim() == 1 ? ys[i].squeeze(0) : shaped(std::move(ys[i]), x);
  }
  return ys;
}

// One kernel on one packed weight, without a table: for tuning and tests.
Tensor direct(const Tensor &x, const std::optional<Tensor> &b, at::TensorList tensors, at::IntArrayRef route,
              int64_t n, int64_t act, const std::optional<Tensor> &active, double x_scale) {
  auto routes = routes_from(tensors, route);
  Tensor rows = as_rows(x);
  Tensor y = active ? at::zeros({rows.size(0), n}, rows.options()) : at::empty({rows.size(0), n}, rows.options());
  std::vector<Job> jobs;
  jobs.push_back(make_job(routes.at(0), act, rows, b, y, static_cast<float>(x_scale)));
  if (active) narrow(jobs[0], {*active, active->numel()});
  run(jobs);
  return shaped(std::move(y), x);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparsec, lib) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};
  lib.def("linear(Tensor x, Tensor weight, Tensor? bias, str plan, Tensor? x_scale=None) -> Tensor", tags);
  lib.def("linear_codes(Tensor x, Tensor[] codes, Tensor? bias, str plan, Tensor? x_scale=None) -> Tensor", tags);
  lib.def("linear_needed(Tensor x, Tensor[] parts, Tensor? bias, Tensor needed, str plan, Tensor? x_scale=None) "
          "-> Tensor", tags);
  lib.def("linear_group(Tensor x, Tensor[] parts, int[] counts, Tensor?[] biases, str[] plans, Tensor?[] x_scales) "
          "-> Tensor[]", tags);
  lib.def("resolve(Tensor[] parts, str plan) -> ()");
  lib.def("computed(Tensor[] parts, str plan) -> Tensor");
  lib.def("verify(Tensor x, Tensor weight, Tensor? bias, Tensor y, str plan, float x_scale) -> ()");
  lib.def("install(Tensor[] parts, str plan, int[] facts, float x_scale, Tensor[] tensors, int[] routes, "
          "Tensor? dense) -> ()");
  lib.def("forget(int impl) -> int", forget);
  lib.def("uses(int impl, str plan) -> int", uses);
  lib.def("meters() -> (str[], int[])", meters);
  lib.def("direct(Tensor x, Tensor? bias, Tensor[] tensors, int[] route, int n, int act, "
          "Tensor? active=None, float x_scale=0.0) -> Tensor");
}

TORCH_LIBRARY_IMPL(sparsec, CPU, lib) {
  lib.impl("linear", linear);
  lib.impl("linear_codes", linear_codes);
  lib.impl("linear_needed", linear_needed);
  lib.impl("linear_group", linear_group);
  lib.impl("install", install);
  lib.impl("direct", direct);
}

#include "conv.h"
#include "packed.h"
