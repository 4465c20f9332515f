// One row of the layout "words" (words.h has its order), for the loop "select".
constexpr int kMostRows = !kWide ? 1 : kGroupColumns ? 2 : 4;
constexpr int kGroup = 4;
constexpr int kWords = kChunk / 32;
constexpr int64_t kChunkBytes = kChunk * kBits / 8;
constexpr int kGroupWords = kGroupColumns ? kGroupColumns / 32 : kWords;

template <int MB>
INLINE void dot_row(const SparsecCall *call, int64_t row, int64_t, const Lane *x, int64_t stride, F16 *acc) {
  int64_t chunks = ceil_div(call->k, kChunk);
  const Stored *v = pack_of<Stored>(call, 0) + (row / kGroup * chunks * kGroup + row % kGroup) * kChunkBytes;
  Group<Lane> values;
  if (!kGroupColumns) values = Group<Lane>(call, row, 0);
  F16 total[MB];
  for (int r = 0; r < MB; ++r) total[r] = zero16();
  for (int64_t c = 0; c < chunks; ++c, v += kGroup * kChunkBytes) {
    __builtin_prefetch(reinterpret_cast<const char *>(v) + kAhead);
    Chunk<kBits, Lane> codes(v);
    for (int j = 0; j < kWords;) {
      if (kGroupColumns) values = Group<Lane>(call, row, c * (kWords / kGroupWords) + j / kGroupWords);
      F16 part[MB];
      for (int r = 0; r < MB; ++r) part[r] = kGroupColumns ? zero16() : total[r];
#pragma GCC unroll 4
      for (int i = 0; i < kGroupWords; ++i, ++j) {
        auto wide = codes.word(j, values.lut);
        for (int r = 0; r < MB; ++r) part[r] = mac32(part[r], wide, load32(x + r * stride + c * kChunk + 32 * j));
      }
      for (int r = 0; r < MB; ++r) total[r] = kGroupColumns ? values.joined(total[r], part[r]) : part[r];
    }
  }
  for (int r = 0; r < MB; ++r) acc[r] = kGroupColumns ? total[r] : values.joined(zero16(), total[r]);
}
