// Layout "bitmap": one bit a position and the kept values, interleaved so that a thread reads two streams from begin
// to end. Order of both: group of 4 rows, word of 32 columns, row in the group. pack: masks (uint32), values, and for
// each group of 4 rows the first of its values (int64). With kFixed > 0 (N:M) every word keeps exactly kFixed values,
// and nothing has to be counted.

constexpr int kGroup = 4;
constexpr int kMostRows = kWide ? 4 : 1;

INLINE int kept(uint32_t mask) { return kFixed ? kFixed : __builtin_popcount(mask); }

template <int MB>
INLINE void dot_tile(const SparsecCall *call, int64_t tile, const Value *x, int64_t stride, F16 *sums) {
  int64_t words = ceil_div(call->k, 32);
  alignas(64) float out[MB][kRows];
  for (int64_t g = 0; g < kRows / kGroup; ++g) {
    int64_t group = tile * (kRows / kGroup) + g;
    const uint32_t *mask = pack_of<uint32_t>(call, 0) + group * words * kGroup;
    const Value *v = pack_of<Value>(call, 1) + pack_of<int64_t>(call, 2)[group];
    F16 acc[MB][kGroup];
    for (int m = 0; m < MB; ++m)
      for (int r = 0; r < kGroup; ++r) acc[m][r] = zero16();
    for (int64_t w = 0; w < words; ++w, mask += kGroup) {
      decltype(load32(x)) xs[MB];
      for (int m = 0; m < MB; ++m) xs[m] = load32(x + m * stride + 32 * w);
#pragma GCC unroll 4
      for (int r = 0; r < kGroup; ++r) {
        __builtin_prefetch(reinterpret_cast<const char *>(v) + kAhead);  // a word of fp32 is up to two lines
        auto wide = expand32(mask[r], v);
        v += kept(mask[r]);
        for (int m = 0; m < MB; ++m) acc[m][r] = mac32(acc[m][r], wide, xs[m]);
      }
    }
    for (int m = 0; m < MB; ++m) sums4(acc[m], out[m] + g * kGroup);
  }
  for (int m = 0; m < MB; ++m) sums[m] = load16(out[m]);
}
