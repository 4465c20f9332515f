// Layout "words": codes of every position, zeros too. Order: group of 4 rows, chunk of 128 columns, row in the group.
// The codes of a chunk are 32 elements of 4 codes, in which column 32j + i is code j of element i, so that a shift puts
// 32 neighbours into lanes; codes of 3 and 8 bits are in the order of their columns. pack: codes.
// Books of 8 levels: 3 bits took 1.3 times as long as 4 with one row of x on one thread, where decoding is what takes
// time, for 0.76x the bytes (in bitmaps as long, for 0.86x): both are measured and the cheaper is chosen. 2 bits took
// 0.78x.

constexpr int kGroup = 4;
constexpr int kMostRows = !kWide ? 1 : kGroupColumns ? 2 : 4;
constexpr int kWords = kChunk / 32;
constexpr int64_t kChunkBytes = kChunk * kBits / 8;
constexpr int kGroupWords = kGroupColumns ? kGroupColumns / 32 : kWords;

INLINE const Stored *words_of(const SparsecCall *call, int64_t group) {
  return pack_of<Stored>(call, 0) + group * ceil_div(call->k, kChunk) * kGroup * kChunkBytes;
}

template <int MB>
INLINE void dot_tile(const SparsecCall *call, int64_t tile, const Lane *x, int64_t stride, F16 *sums) {
  int64_t chunks = ceil_div(call->k, kChunk);
  alignas(64) float out[MB][kRows];
  for (int64_t g = 0; g < kRows; g += kGroup) {
    const Stored *v = words_of(call, (tile * kRows + g) / kGroup);
    F16 total[MB][kGroup];
    Group<Lane> values[kGroup];
    for (int r = 0; r < kGroup; ++r) {
      if (!kGroupColumns) values[r] = Group<Lane>(call, tile * kRows + g + r, 0);
      for (int m = 0; m < MB; ++m) total[m][r] = zero16();
    }
    for (int64_t c = 0; c < chunks; ++c) {
#pragma GCC unroll 4
      for (int r = 0; r < kGroup; ++r, v += kChunkBytes) {
        for (int64_t b = 0; b < kChunkBytes; b += 64) __builtin_prefetch(reinterpret_cast<const char *>(v) + kAhead + b);
        Chunk<kBits, Lane> codes(v);
        for (int j = 0; j < kWords;) {
          if (kGroupColumns) values[r] = Group<Lane>(call, tile * kRows + g + r, c * (kWords / kGroupWords) + j / kGroupWords);
          F16 acc[MB];
          for (int m = 0; m < MB; ++m) acc[m] = kGroupColumns ? zero16() : total[m][r];
#pragma GCC unroll 4
          for (int i = 0; i < kGroupWords; ++i, ++j) {
            auto wide = codes.word(j, values[r].lut);
            for (int m = 0; m < MB; ++m) acc[m] = mac32(acc[m], wide, load32(x + m * stride + c * kChunk + 32 * j));
          }
          for (int m = 0; m < MB; ++m) total[m][r] = kGroupColumns ? values[r].joined(total[m][r], acc[m]) : acc[m];
        }
      }
    }
    if (!kGroupColumns)
      for (int m = 0; m < MB; ++m)
        for (int r = 0; r < kGroup; ++r) total[m][r] = values[r].joined(zero16(), total[m][r]);
    for (int m = 0; m < MB; ++m) sums4(total[m], out[m] + g);
  }
  for (int m = 0; m < MB; ++m) sums[m] = load16(out[m]);
}
