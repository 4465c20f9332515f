// Layout "bitmap": one bit a position and the kept values, interleaved so that a thread reads two streams from begin
// to end. Order of both: group of 4 rows, word of 32 columns, row in the group. pack: masks (uint32), values, and for
// each group of 4 rows the first of its values (int64). With kFixed > 0 (N:M) every word keeps exactly kFixed values,
// and nothing has to be counted. Codes of a word start in a new byte.

constexpr int kGroup = 4;
constexpr int kMostRows = !kWide ? 1 : kGroupColumns ? 2 : 4;  // sums of a group and of the row want registers
constexpr int64_t kGroupWords = kGroupColumns / 32;

INLINE int kept(uint32_t mask) { return kFixed ? kFixed : __builtin_popcount(mask); }

// acc[m][r] += words [begin, end) of 4 rows times row m of x; mask and v move on
template <int MB>
INLINE void words(const Group<Lane> *values, const uint32_t *&mask, const Stored *&v, const Lane *x, int64_t stride,
                  int64_t begin, int64_t end, F16 (&acc)[MB][kGroup]) {
  for (int64_t w = begin; w < end; ++w, mask += kGroup) {
    decltype(load32(x)) xs[MB];
    for (int m = 0; m < MB; ++m) xs[m] = load32(x + m * stride + 32 * w);
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) {
      __builtin_prefetch(reinterpret_cast<const char *>(v) + kAhead);  // a word of fp32 is up to two lines
      auto wide = expand32(mask[r], v, values[r]);
      v = after(v, kept(mask[r]));
      for (int m = 0; m < MB; ++m) acc[m][r] = mac32(acc[m][r], wide, xs[m]);
    }
  }
}

template <int MB>
INLINE void dot_tile(const SparsecCall *call, int64_t tile, const Lane *x, int64_t stride, F16 *sums) {
  int64_t words_of_row = ceil_div(call->k, 32), step = kGroupWords ? kGroupWords : words_of_row;
  alignas(64) float out[MB][kRows];
  for (int64_t g = 0; g < kRows / kGroup; ++g) {
    int64_t group = tile * (kRows / kGroup) + g;
    const uint32_t *mask = pack_of<uint32_t>(call, 0) + group * words_of_row * kGroup;
    const Stored *v = pack_of<Stored>(call, 1) + pack_of<int64_t>(call, 2)[group];
    F16 total[MB][kGroup];
    for (int m = 0; m < MB; ++m)
      for (int r = 0; r < kGroup; ++r) total[m][r] = zero16();
    for (int64_t w = 0, part = 0; w < words_of_row; w += step, ++part) {
      F16 acc[MB][kGroup];
      Group<Lane> values[kGroup];
      for (int r = 0; r < kGroup; ++r) {
        values[r] = Group<Lane>(call, group * kGroup + r, part);
        for (int m = 0; m < MB; ++m) acc[m][r] = zero16();
      }
      words<MB>(values, mask, v, x, stride, w, w + step < words_of_row ? w + step : words_of_row, acc);
      for (int m = 0; m < MB; ++m)
        for (int r = 0; r < kGroup; ++r) total[m][r] = values[r].joined(total[m][r], acc[m][r]);
      if (!kGroupWords) break;
    }
    for (int m = 0; m < MB; ++m) sums4(total[m], out[m] + g * kGroup);
  }
  for (int m = 0; m < MB; ++m) sums[m] = load16(out[m]);
}
