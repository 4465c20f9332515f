// What the generated table of a library says of its operators, each of which runs one format.
struct Loop {  // codegen/spec.py has the meaning of the four functions
  int64_t (*scratch)(int64_t m, int64_t k);
  int64_t (*units)(int64_t m, int64_t k);
  void (*prepare)(const SparsecCall *, int64_t begin, int64_t end);
  void (*run)(const SparsecCall *, int64_t begin, int64_t end);
};

enum Isa { kAvx512, kAvx2, kPortable, kIsas };

struct Layer;

struct OpInfo {
  const char *name;
  size_t packs;  // tensors of the pack
  // Null where tensors (after x, bias, work) are a pack of n x k weights, else what is wrong with them.
  const char *(*wrong)(const Layer &, const OrtSizes *sizes, const void *const *data);
  int bits;                   // of a code, 0 where values are floats
  int64_t group;              // columns that share a scale, 0 for a row
  int masked;                 // whether a code is stored only where a mask says so
  int fixed;                  // whether all of x is rounded with one scale, an attribute
  Loop dot[kIsas], outer[kIsas];  // without functions where an ISA has none; `outer` serves many rows of x
};

extern const OpInfo kOps[];
extern const size_t kOpCount;

// A node of a model.
struct Layer {
  Ort ort;
  const OpInfo *op;
  int64_t n, k, outer_from;
  float x_scale;  // 0: each row of x has its own

  int64_t tiles() const { return (n + 15) / 16; }
};

const char *wrong_bitmap(const Layer &, const OrtSizes *, const void *const *);
const char *wrong_slices(const Layer &, const OrtSizes *, const void *const *);
const char *wrong_steps(const Layer &, const OrtSizes *, const void *const *);
