// Operators of the domain "sparsec" for ONNX Runtime: y = x W^T + bias, where W [n, k] is the inputs behind `work`,
// a pack as codegen/cpp/ makes it, used as it is stored. A model may hold anything, so every pack is looked through when
// its kernel is made, and what does not fit is refused.
#include "op.h"

#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

constexpr size_t kX = 0, kBias = 1, kWork = 2, kPack = 3, kMostPacks = 8;
constexpr int64_t kMostSide = int64_t{1} << 31;
constexpr float kMostScale = 1e36f;  // times 127 it is a number
constexpr int64_t kParts = 16;          // pieces that threads take one by one
constexpr int64_t kWorthThreads = 4096;  // of work

Isa isa() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
                __builtin_cpu_supports("avx512vbmi");
  return avx2 && avx512 ? kAvx512 : avx2 ? kAvx2 : kPortable;
#else
  return kPortable;
#endif
}
const Isa kIsa = isa();

struct Registered : OrtCustomOp {
  const OpInfo *info;
};

// Memory of a thread that only grows.
struct Scratch {
  void *at = nullptr;
  size_t size = 0;
  ~Scratch() { free(at); }
  void *room(size_t bytes) {
    if (bytes > size) {
      free(at);
      size = (bytes + 4095) / 4096 * 4096;
      at = aligned_alloc(64, size);
      if (!at) size = 0;
    }
    return at;
  }
};
thread_local Scratch scratch;

struct Parallel {
  const SparsecCall *call;
  const Loop *loop;
  const int64_t *work;
  int64_t units, tiles, parts;
};

void prepare_part(void *data, size_t part) {
  auto &all = *static_cast<const Parallel *>(data);
  auto i = static_cast<int64_t>(part);
  all.loop->prepare(all.call, i * all.units / all.parts, (i + 1) * all.units / all.parts);
}

// The first tile of a part when all parts have as much work.
int64_t first_tile(const Parallel &all, int64_t part) {
  if (part >= all.parts) return all.tiles;
  int64_t goal = all.work[0] + (all.work[all.tiles] - all.work[0]) / all.parts * part, low = 0, high = all.tiles;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (all.work[middle] < goal) low = middle + 1;
    else high = middle;
  }
  return low;
}

void run_part(void *data, size_t part) {
  auto &all = *static_cast<const Parallel *>(data);
  auto i = static_cast<int64_t>(part);
  int64_t begin = first_tile(all, i), end = first_tile(all, i + 1);
  if (begin < end) all.loop->run(all.call, begin, end);
}

OrtStatus *each(const Ort &ort, const OrtKernelContext *context, void (*f)(void *, size_t), Parallel &all) {
  if (all.parts > 1) return ort.parallel(context, f, static_cast<size_t>(all.parts), &all);
  f(&all, 0);
  return nullptr;
}

const char *wrong_work(const Layer &layer, const OrtSizes &sizes, const void *data) {
  if (sizes.type != kOrtInt64 || sizes.count != layer.tiles() + 1) return "work has not one int64 a tile and one more";
  auto *work = static_cast<const int64_t *>(data);
  if (work[0] < 0 || work[layer.tiles()] > kMostSide * kMostSide) return "work is out of range";
  for (int64_t i = 0; i < layer.tiles(); ++i)
    if (work[i] > work[i + 1]) return "work does not ascend";
  return nullptr;
}

// Pages of 2 MiB where the system has them: see codegen/cpp/pages.py.
void in_large_pages(const void *data, const OrtSizes &sizes) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
  auto at = reinterpret_cast<uintptr_t>(data), begin = (at + kPage - 1) / kPage * kPage;
  uintptr_t end = (at + static_cast<uintptr_t>(sizes.count) * (sizes.type == kOrtFloat ? 4 : 1)) / kPage * kPage;
  if (begin >= end || madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE)) return;
  madvise(reinterpret_cast<void *>(begin), end - begin, kCollapse);
#endif
}

const char *wrong_layer(const OrtKernelInfo *info, Layer &layer) {
  const Ort &ort = layer.ort;
  int64_t version = 0;
  bool said = ort.attribute(info, "n", &layer.n) && ort.attribute(info, "k", &layer.k);
  said = said && ort.attribute(info, "outer_from", &layer.outer_from) && ort.attribute(info, "version", &version);
  if (layer.op->fixed) said = said && ort.attribute(info, "x_scale", &layer.x_scale);
  if (!said) return "an attribute is missing";
  if (version != SPARSEC_LAYOUT) return "it was written by another version of sparsec";
  if (layer.n < 1 || layer.k < 1 || layer.n >= kMostSide || layer.k >= kMostSide) return "n or k is out of range";
  if (layer.op->fixed && !(layer.x_scale > 0 && layer.x_scale < kMostScale)) return "x_scale is out of range";
  OrtSizes sizes[kPack + kMostPacks] = {};
  const void *data[kPack + kMostPacks] = {};
  for (size_t i = kBias; i < kPack + layer.op->packs; ++i) {
    int constant = 0;
    const OrtValue *value = nullptr;
    void *at = nullptr;
    if (!ort.constant(info, i, &constant, &value) || !constant || !ort.data(value, &at))
      return "all inputs but the first must be initializers";
    sizes[i] = OrtSizes(ort, value), data[i] = at;
    if (sizes[i].rank != 1) return "an initializer has not one dimension";
  }
  if (sizes[kBias].type != kOrtFloat || sizes[kBias].count != layer.n) return "the bias has not n floats";
  if (const char *why = wrong_work(layer, sizes[kWork], data[kWork])) return why;
  if (const char *why = layer.op->wrong(layer, sizes + kPack, data + kPack)) return why;
  for (size_t i = 0; i < layer.op->packs; ++i) in_large_pages(data[kPack + i], sizes[kPack + i]);
  return nullptr;
}

OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  auto *layer = static_cast<Layer *>(calloc(1, sizeof(Layer)));
  Ort ort{api};
  if (!layer) return ort.error(kOrtFail, "sparsec: no memory");
  layer->ort = ort, layer->op = static_cast<const Registered *>(op)->info;
  const char *why = wrong_layer(info, *layer);
  if (!why) {
    *out = layer;
    return nullptr;
  }
  char text[256] = "sparsec::";
  strncat(text, layer->op->name, 100);
  strncat(text, " cannot be loaded: ", 30);
  strncat(text, why, 100);
  free(layer);
  return ort.error(kOrtInvalidArgument, text);
}

OrtStatus *compute(void *kernel, OrtKernelContext *context) {
  auto &layer = *static_cast<const Layer *>(kernel);
  const Ort &ort = layer.ort;
  const OrtValue *value[kPack + kMostPacks];
  void *data[kPack + kMostPacks];
  size_t count = kPack + layer.op->packs;
  for (size_t i = 0; i < count; ++i)
    if (!ort.input(context, i, &value[i]) || !ort.data(value[i], &data[i]))
      return ort.error(kOrtFail, "sparsec: an input cannot be read");
  OrtSizes x(ort, value[kX]);
  if (x.type != kOrtFloat || x.rank < 1 || x.dims[x.rank - 1] != layer.k)
    return ort.error(kOrtInvalidArgument, "sparsec: x is not float [..., k] with the k of the weight");
  int64_t m = x.count / layer.k;
  x.dims[x.rank - 1] = layer.n;
  OrtValue *result = nullptr;
  void *y = nullptr;
  if (OrtStatus *status = ort.output(context, x.dims, static_cast<size_t>(x.rank), &result)) return status;
  if (!ort.data(result, &y)) return ort.error(kOrtFail, "sparsec: the output cannot be written");
  if (m == 0) return nullptr;

  const Loop &outer = layer.op->outer[kIsa];
  const Loop &loop = outer.run && layer.outer_from > 0 && m >= layer.outer_from ? outer : layer.op->dot[kIsa];
  if (m > kMostSide) return ort.error(kOrtInvalidArgument, "sparsec: x has too many rows");
  void *room = scratch.room(static_cast<size_t>(loop.scratch(m, layer.k)) + 64);
  if (!room) return ort.error(kOrtFail, "sparsec: no memory");
  SparsecCall call = {data[kX], layer.k, y, layer.n, data[kBias], data + kPack, room, m, layer.n, layer.k,
                      0, layer.x_scale, nullptr, 0};
  auto *work = static_cast<const int64_t *>(data[kWork]);
  Parallel all = {&call, &loop, work, loop.units(m, layer.k), layer.tiles(), 1};
  all.parts = all.units < kParts ? all.units : kParts;
  if (all.units > 0)
    if (OrtStatus *status = each(ort, context, prepare_part, all)) return status;
  all.parts = work[all.tiles] < kWorthThreads ? 1 : all.tiles < kParts ? all.tiles : kParts;
  return each(ort, context, run_part, all);
}

Registered *registered() {
  static Registered *ops = nullptr;
  if (ops) return ops;
  auto *made = static_cast<Registered *>(calloc(kOpCount, sizeof(Registered)));
  for (size_t i = 0; made && i < kOpCount; ++i) {
    Registered &op = made[i];
    op.version = kOrtVersion;
    op.info = &kOps[i];
    op.name = [](const OrtCustomOp *o) { return static_cast<const Registered *>(o)->info->name; };
    op.provider = [](const OrtCustomOp *) -> const char * { return nullptr; };
    op.inputs = [](const OrtCustomOp *o) { return kPack + static_cast<const Registered *>(o)->info->packs; };
    op.outputs = [](const OrtCustomOp *) { return size_t{1}; };
    op.input_type = [](const OrtCustomOp *, size_t i) -> int { return i <= kBias ? kOrtFloat : kOrtAny; };
    op.output_type = [](const OrtCustomOp *, size_t) -> int { return kOrtFloat; };
    op.input_kind = op.output_kind = op.input_memory = [](const OrtCustomOp *, size_t) { return 0; };
    op.least_inputs = op.same_inputs = op.least_outputs = op.same_outputs = [](const OrtCustomOp *) { return 1; };
    op.create_v2 = create;
    op.compute_v2 = compute;
    op.destroy = [](void *kernel) { free(kernel); };
    op.first_version = [](const OrtCustomOp *) { return 1; };
    op.last_version = [](const OrtCustomOp *) { return 1; };
  }
  return ops = made;
}

bool domain_of(const Ort &ort, OrtCustomOpDomain **out) {
  Registered *ops = registered();
  if (!ops || !ort.new_domain("sparsec", out)) return false;
  for (size_t i = 0; i < kOpCount; ++i)
    if (!ort.add_op(*out, &ops[i])) return false;
  return true;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                             const OrtApiBase *base) {
  const OrtApi *api = base->get_api(kOrtVersion);
  if (!api) {  // what the oldest has, to say so
    const OrtApi *oldest = base->get_api(1);
    return oldest ? Ort{oldest}.error(kOrtFail, "sparsec needs ONNX Runtime 1.22 or newer") : nullptr;
  }
  Ort ort{api};
  static OrtCustomOpDomain *domain = nullptr;  // of every session of this process
  OrtCustomOpDomain *made = nullptr;
  if (!domain) {
    if (!domain_of(ort, &made)) return ort.error(kOrtFail, "sparsec: its operators cannot be registered");
    domain = made;
  }
  return ort.add_domain(options, domain);
}
