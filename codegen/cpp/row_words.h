// Layout "row_words", for the loop "select": the codes of words.h, but each row for itself, since reading every fourth
// piece of 128 codes takes as long as reading all of them. pack: codes.
constexpr int kMostRows = !kWide ? 1 : kGroupColumns ? 2 : 4;
constexpr int kWords = kChunk / 32;
constexpr int64_t kChunkBytes = kChunk * kBits / 8;
constexpr int kGroupWords = kGroupColumns ? kGroupColumns / 32 : kWords;

template <int MB>
INLINE void dot_row(const SparsecCall *call, int64_t row, int64_t next, const Lane *x, int64_t stride, F16 *acc) {
  constexpr int kSums = MB < 4 ? 4 / MB : 1;  // in flight, so that none waits for itself
  int64_t bytes = ceil_div(call->k, kChunk) * kChunkBytes;
  const char *v = pack_of<char>(call, 0) + row * bytes, *end = v + bytes;
  const int64_t jump = (next - row - 1) * bytes;  // from behind the end of this row to the one that is read next
  Group<Lane> values;
  if (!kGroupColumns) values = Group<Lane>(call, row, 0);
  F16 sums[MB][kSums];
  for (int r = 0; r < MB; ++r)
    for (int s = 0; s < kSums; ++s) sums[r][s] = zero16();
  for (int64_t word = 0; v < end; v += kChunkBytes) {
    const char *ahead = v + kAhead + (v + kAhead < end ? 0 : jump);
    for (int64_t b = 0; b < kChunkBytes; b += 64) __builtin_prefetch(ahead + b);
    Chunk<kBits, Lane> codes(reinterpret_cast<const Stored *>(v));
    for (int j = 0; j < kWords;) {
      if (kGroupColumns) values = Group<Lane>(call, row, word / kGroupWords);
      F16 part[MB];
      for (int r = 0; r < MB; ++r) part[r] = zero16();
#pragma GCC unroll 4
      for (int i = 0; i < kGroupWords; ++i, ++j, ++word) {
        auto wide = codes.word(j, values.lut);
        for (int r = 0; r < MB; ++r) {
          F16 &sum = kGroupColumns ? part[r] : sums[r][i % kSums];
          sum = mac32(sum, wide, load32(x + r * stride + 32 * word));
        }
      }
      for (int r = 0; r < MB && kGroupColumns; ++r) acc[r] = values.joined(acc[r], part[r]);
    }
  }
  for (int r = 0; r < MB && !kGroupColumns; ++r) {
    for (int s = 1; s < kSums; ++s) sums[r][0] = add(sums[r][0], sums[r][s]);
    acc[r] = values.joined(acc[r], sums[r][0]);
  }
}
