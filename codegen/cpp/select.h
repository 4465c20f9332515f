// Loop "select": only the outputs that somebody reads: call->active lists rows of W, and no other output is written.
// Expects dot_x.h, and from the layout: kMostRows and
//   template <int MB>
//   void dot_row(const SparsecCall *, int64_t row, int64_t next, const Lane *x, int64_t stride, F16 *acc);
// where the lanes of acc[i] sum up to the output of row i of x; `next` is the row of W that will be asked for then. A tile
// is 16 entries of the list.

// out[r][i] += the outliers of row wanted[i] times row `row` + r of x. They lie by tiles of rows of W, so neighbours in
// the list that are of one tile share what is computed for it.
template <int MB>
INLINE void add_selected_outliers(const SparsecCall *call, const int32_t *wanted, int count, int64_t row,
                                  float (*out)[kRows]) {
  for (int i = 0; i < count;) {
    int64_t tile = wanted[i] / kRows;
    F16 sums[MB];
    for (int r = 0; r < MB; ++r) sums[r] = zero16();
    add_outliers(call, row, MB, tile, sums);
    alignas(64) float of[MB][kRows];
    for (int r = 0; r < MB; ++r) store16(of[r], sums[r]);
    for (; i < count && wanted[i] / kRows == tile; ++i)
      for (int r = 0; r < MB; ++r) out[r][i] += of[r][wanted[i] % kRows];
  }
}

template <int MB>
__attribute__((noinline)) void selected_rows(const SparsecCall *call, int64_t begin, int64_t row) {
  int64_t left = call->active_count - begin, stride = dot_stride(call->k);
  int count = left < kRows ? static_cast<int>(left) : kRows;
  const int32_t *wanted = call->active + begin;
  const Lane *x = static_cast<const Lane *>(call->scratch) + row * stride;
  alignas(64) float out[MB][kRows] = {}, bias[kRows] = {};
  for (int i = 0; i < count; i += 4) {
    F16 acc[MB][4];
    for (int e = 0; e < 4; ++e) {
      F16 sums[MB];
      for (int r = 0; r < MB; ++r) sums[r] = zero16();
      if (i + e < count) dot_row<MB>(call, wanted[i + e], wanted[i + e + (i + e + 1 < left)], x, stride, sums);
      for (int r = 0; r < MB; ++r) acc[r][e] = sums[r];
    }
    for (int r = 0; r < MB; ++r) sums4(acc[r], out[r] + i);
  }
  add_selected_outliers<MB>(call, wanted, count, row, out);
  if (call->bias)
    for (int i = 0; i < count; ++i) bias[i] = to_float(static_cast<const X *>(call->bias)[wanted[i]]);
  for (int r = 0; r < MB; ++r) {
    F16 y = add(load16(out[r]), load16(bias));
    activate(call->act, 1, &y);
    alignas(64) X last[kRows];
    store_n(last, kRows, y);
    X *to = static_cast<X *>(call->y) + (row + r) * call->y_stride;
    for (int i = 0; i < count; ++i) to[wanted[i]] = last[i];
  }
}

EXPORT void sparsec_run(const SparsecCall *call, int64_t tile_begin, int64_t tile_end) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    int64_t row = 0;
    if constexpr (kMostRows >= 4)
      for (; row + 4 <= call->m; row += 4) selected_rows<4>(call, tile * kRows, row);
    if constexpr (kMostRows >= 2)
      for (; row + 2 <= call->m; row += 2) selected_rows<2>(call, tile * kRows, row);
    for (; row < call->m; ++row) selected_rows<1>(call, tile * kRows, row);
  }
}
