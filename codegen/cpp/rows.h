// Layout "rows": blocks of 1 x 16 columns. pack: values, 16 of each kept block; the block's number in its row (int32);
// for each row the first of its blocks (int64, N rounded up to whole tiles, plus 1).

constexpr int kMostRows = kWide ? 4 : 1;

// acc += the 16 weights of a block of `row`, times x at its columns
INLINE F16 mac16(const SparsecCall *call, F16 acc, int64_t row, const Stored *w, const Lane *x, int64_t column) {
  return fma(values16(w, Group<float>(call, row, part_of(column))), load16(x + column), acc);
}

template <int MB>
INLINE void dot_tile(const SparsecCall *call, int64_t tile, const Lane *x, int64_t stride, F16 *sums) {
  const int32_t *block = pack_of<int32_t>(call, 1);
  const int64_t *start = pack_of<int64_t>(call, 2) + tile * kRows;
  alignas(64) float out[MB][kRows];
  for (int r = 0; r < kRows; r += 4) {
    F16 acc[MB][4];
    for (int q = 0; q < 4; ++q) {
      for (int m = 0; m < MB; ++m) acc[m][q] = zero16();
      F16 second[MB];
      for (int m = 0; m < MB; ++m) second[m] = zero16();
      int64_t b = start[r + q], end = start[r + q + 1];
      const Stored *v = after(pack_of<Stored>(call, 0), 16 * b);
      int64_t row = tile * kRows + r + q;
      for (; b + 2 <= end; b += 2, v = after(v, 32)) {
        for (int m = 0; m < MB; ++m) {
          acc[m][q] = mac16(call, acc[m][q], row, v, x + m * stride, 16 * static_cast<int64_t>(block[b]));
          second[m] = mac16(call, second[m], row, after(v, 16), x + m * stride, 16 * static_cast<int64_t>(block[b + 1]));
        }
      }
      for (int m = 0; m < MB && b < end; ++m)
        acc[m][q] = mac16(call, acc[m][q], row, v, x + m * stride, 16 * static_cast<int64_t>(block[b]));
      for (int m = 0; m < MB; ++m) acc[m][q] = add(acc[m][q], second[m]);
    }
    for (int m = 0; m < MB; ++m) sums4(acc[m], out[m] + r);
  }
  for (int m = 0; m < MB; ++m) sums[m] = load16(out[m]);
}
