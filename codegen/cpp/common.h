// What every kernel starts from: value types, sizes, and where things lie in scratch.
#define INLINE static inline __attribute__((always_inline))
#define MEMBER inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))

struct bf16 {
  uint16_t bits;
};
INLINE float to_float(float v) { return v; }
INLINE float to_float(bf16 v) {
  uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
// Round to nearest even; a NaN keeps its sign and upper bits and stays a NaN.
INLINE bf16 to_bf16(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  if (f != f) return {static_cast<uint16_t>((bits | 0x400000) >> 16)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// One byte of a stream of BITS-bit codes, the first code in the lowest bits.
template <int BITS>
struct Code {
  uint8_t bits;
};

constexpr int64_t kRows = 16;    // rows of W in a tile, the unit of sparsec_run
constexpr int64_t kChunk = 128;  // columns of W that are worked on together

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class P>
INLINE const P *pack_of(const SparsecCall *call, int i) {
  return static_cast<const P *>(call->pack[i]);
}
