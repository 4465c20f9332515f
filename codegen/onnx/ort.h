// The part of ONNX Runtime's C interface that a custom operator needs, declared here since no package brings headers.
// OrtApi is a table of functions that only ever grows at its end, so a slot's number is its name; the numbers are those
// of the releases since 1.15. OrtCustomOp is a struct of 26 fields, of which a runtime reads those that `version` has.
#include <stddef.h>
#include <stdint.h>

struct OrtStatus;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtShape;  // OrtTensorTypeAndShapeInfo
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtCustomOp;

struct OrtApi {
  void (*slot[1])();
};
struct OrtApiBase {
  const OrtApi *(*get_api)(uint32_t version);  // null where the runtime is older than that
  const char *(*version)();
};

constexpr uint32_t kOrtVersion = 22;
enum { kOrtFail = 1, kOrtInvalidArgument = 2 };
enum { kOrtAny = 0, kOrtFloat = 1, kOrtUint8 = 2, kOrtInt64 = 7 };

struct OrtCustomOp {
  uint32_t version;
  void *(*create)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
  const char *(*name)(const OrtCustomOp *);
  const char *(*provider)(const OrtCustomOp *);
  int (*input_type)(const OrtCustomOp *, size_t);
  size_t (*inputs)(const OrtCustomOp *);
  int (*output_type)(const OrtCustomOp *, size_t);
  size_t (*outputs)(const OrtCustomOp *);
  void (*compute)(void *, OrtKernelContext *);
  void (*destroy)(void *);
  int (*input_kind)(const OrtCustomOp *, size_t);
  int (*output_kind)(const OrtCustomOp *, size_t);
  int (*input_memory)(const OrtCustomOp *, size_t);
  int (*least_inputs)(const OrtCustomOp *);
  int (*same_inputs)(const OrtCustomOp *);
  int (*least_outputs)(const OrtCustomOp *);
  int (*same_outputs)(const OrtCustomOp *);
  OrtStatus *(*create_v2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
  OrtStatus *(*compute_v2)(void *, OrtKernelContext *);
  OrtStatus *(*infer_shape)(const OrtCustomOp *, void *);
  int (*first_version)(const OrtCustomOp *);
  int (*last_version)(const OrtCustomOp *);
  size_t (*may_inplace)(int **, int **);
  void (*release_may_inplace)(int *, int *);
  size_t (*aliases)(int **, int **);
  void (*release_aliases)(int *, int *);
};

struct Ort {
  const OrtApi *api;

  template <class... A>
  OrtStatus *call(int slot, A... arguments) const {
    return reinterpret_cast<OrtStatus *(*)(A...)>(api->slot[slot])(arguments...);
  }
  OrtStatus *error(int code, const char *text) const { return call<int, const char *>(0, code, text); }
  void release_status(OrtStatus *s) const { reinterpret_cast<void (*)(OrtStatus *)>(api->slot[93])(s); }
  // What fails where nothing has to be said about it.
  template <class... A>
  bool ok(int slot, A... arguments) const {
    OrtStatus *status = call<A...>(slot, arguments...);
    if (status) release_status(status);
    return !status;
  }

  bool new_domain(const char *name, OrtCustomOpDomain **out) const { return ok(26, name, out); }
  bool add_op(OrtCustomOpDomain *domain, const OrtCustomOp *op) const { return ok(27, domain, op); }
  OrtStatus *add_domain(OrtSessionOptions *to, OrtCustomOpDomain *domain) const { return call(28, to, domain); }
  bool attribute(const OrtKernelInfo *info, const char *name, int64_t *out) const { return ok(86, info, name, out); }
  bool attribute(const OrtKernelInfo *info, const char *name, float *out) const { return ok(85, info, name, out); }
  bool data(const OrtValue *value, void **out) const { return ok(51, const_cast<OrtValue *>(value), out); }
  bool input(const OrtKernelContext *from, size_t i, const OrtValue **out) const { return ok(90, from, i, out); }
  OrtStatus *output(OrtKernelContext *to, const int64_t *dims, size_t rank, OrtValue **out) const {
    return call(91, to, size_t{0}, dims, rank, out);
  }
  bool constant(const OrtKernelInfo *info, size_t i, int *is, const OrtValue **out) const {
    return ok(249, info, i, is, out);
  }
  OrtStatus *parallel(const OrtKernelContext *context, void (*f)(void *, size_t), size_t total, void *data) const {
    return call(274, context, f, total, size_t{0}, data);
  }
};

// A tensor's type and sizes; `rank` is -1 where they cannot be told.
struct OrtSizes {
  static constexpr size_t kMostRank = 16;
  int type = kOrtAny;
  int64_t rank = -1, count = 0, dims[kMostRank] = {};

  OrtSizes() {}
  OrtSizes(const Ort &ort, const OrtValue *value) {
    OrtShape *shape = nullptr;
    size_t found = 0;
    if (!value || !ort.ok(65, value, &shape)) return;
    const OrtShape *info = shape;
    bool known = ort.ok(60, info, &type) && ort.ok(61, info, &found) && found <= kMostRank;
    known = known && ort.ok(62, info, static_cast<int64_t *>(dims), found);
    if (known) {
      rank = static_cast<int64_t>(found), count = 1;
      for (size_t i = 0; i < found; ++i) count *= dims[i];
    }
    reinterpret_cast<void (*)(OrtShape *)>(ort.api->slot[99])(shape);
  }
};
