// Outliers beside a coded weight, added to the sums before the epilogue, so that y is written once. Behind the scales
// and zero points a pack has: the first outlier of each row (int32, N rounded up to whole tiles, plus 1); their columns,
// ascending in a row (uint16, or int32 for more than 65536 columns); their values, of the type of x.

// Outliers [begin, end) of a row times a row of x: four sums, so that none waits for itself.
template <class Column>
INLINE float outliers_dot(const Column *column, const X *value, const X *x, int32_t begin, int32_t end) {
  float sum[4] = {};
  int32_t i = begin;
  for (; i + 4 <= end; i += 4)
    for (int u = 0; u < 4; ++u) sum[u] += to_float(value[i + u]) * to_float(x[column[i + u]]);
  for (; i < end; ++i) sum[0] += to_float(value[i]) * to_float(x[column[i]]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class Column>
INLINE void add_outliers_of(const SparsecCall *call, int64_t row, int rows, const int32_t *begin, F16 *sums) {
  const Column *column = pack_of<Column>(call, kTail + 3);
  const X *value = pack_of<X>(call, kTail + 4);
  for (int i = 0; i < rows; ++i) {
    const X *x = static_cast<const X *>(call->x) + (row + i) * call->x_stride;
    alignas(64) float sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = outliers_dot(column, value, x, begin[r], begin[r + 1]);
    sums[i] = add(sums[i], load16(sum));
  }
}
// sums[i] has the 16 outputs of row `row` + i of x.
INLINE void add_outliers(const SparsecCall *call, int64_t row, int rows, int64_t tile, F16 *sums) {
  const int32_t *begin = pack_of<int32_t>(call, kTail + 2) + tile * kRows;
  if (begin[0] == begin[kRows]) return;
  if (call->k > 65536) add_outliers_of<int32_t>(call, row, rows, begin, sums);
  else add_outliers_of<uint16_t>(call, row, rows, begin, sums);
}

// acc[r][0 .. 16 NV) has the outputs of row r of the tile; x is transposed in blocks of 16 NV rows.
template <int NV>
INLINE void add_outliers_transposed(const SparsecCall *call, int64_t tile, const float *x, float *acc) {
  const int32_t *begin = pack_of<int32_t>(call, kTail + 2) + tile * kRows;
  const uint16_t *narrow = pack_of<uint16_t>(call, kTail + 3);
  const int32_t *wide = pack_of<int32_t>(call, kTail + 3);
  for (int r = 0; r < kRows; ++r, acc += 16 * NV) {
    for (int32_t i = begin[r]; i < begin[r + 1]; ++i) {
      F16 value = splat(to_float(pack_of<X>(call, kTail + 4)[i]));
      const float *xs = x + static_cast<int64_t>(call->k > 65536 ? wide[i] : narrow[i]) * (16 * NV);
      for (int j = 0; j < NV; ++j) store16(acc + 16 * j, fma(value, load16(xs + 16 * j), load16(acc + 16 * j)));
    }
  }
}
