// Outliers beside a coded weight, added to the sums before the epilogue, so that y is written once. Behind the scales
// and zero points a pack has: the first outlier of each row (int32, N rounded up to whole tiles, plus 1); their columns,
// ascending in a row (uint16, or int32 for more than 65536 columns); their values, of the type of x.

template <class Column, class Each>
INLINE void each_outlier(const SparsecCall *call, int64_t tile, Each each) {
  const int32_t *begin = pack_of<int32_t>(call, kTail + 2) + tile * kRows;
  const Column *column = pack_of<Column>(call, kTail + 3);
  const X *value = pack_of<X>(call, kTail + 4);
  for (int r = 0; r < kRows; ++r)
    for (int32_t i = begin[r]; i < begin[r + 1]; ++i) each(r, static_cast<int64_t>(column[i]), to_float(value[i]));
}
template <class Each>
INLINE void each_outlier(const SparsecCall *call, int64_t tile, Each each) {
  const int32_t *begin = pack_of<int32_t>(call, kTail + 2) + tile * kRows;
  if (begin[0] == begin[kRows]) return;
  if (call->k > 65536) return each_outlier<int32_t>(call, tile, each);
  each_outlier<uint16_t>(call, tile, each);
}

// sums[i] has the 16 outputs of row `row` + i of x.
INLINE void add_outliers(const SparsecCall *call, int64_t row, int rows, int64_t tile, F16 *sums) {
  const int32_t *begin = pack_of<int32_t>(call, kTail + 2) + tile * kRows;
  if (begin[0] == begin[kRows]) return;
  for (int i = 0; i < rows; ++i) {
    const X *x = static_cast<const X *>(call->x) + (row + i) * call->x_stride;
    alignas(64) float sum[kRows] = {};
    each_outlier(call, tile, [&](int r, int64_t column, float value) { sum[r] += value * to_float(x[column]); });
    sums[i] = add(sums[i], load16(sum));
  }
}
// acc[r][0 .. 16 NV) has the outputs of row r of the tile; x is transposed in blocks of 16 NV rows.
template <int NV>
INLINE void add_outliers_transposed(const SparsecCall *call, int64_t tile, const float *x, float *acc) {
  each_outlier(call, tile, [&](int r, int64_t column, float value) {
    float *sum = acc + r * 16 * NV;
    const float *xs = x + column * 16 * NV;
    for (int j = 0; j < NV; ++j) store16(sum + 16 * j, fma(splat(value), load16(xs + 16 * j), load16(sum + 16 * j)));
  });
}
