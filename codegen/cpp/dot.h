// Loop "dot": a few rows of x against each tile of W. Expects dot_x.h, and from the layout: kMostRows and
//   template <int MB> void dot_tile(const SparsecCall *, int64_t tile, const Lane *x, int64_t stride, F16 *sums);
// where sums[i] gets the 16 outputs of row i of x.

template <int MB>
__attribute__((noinline)) void dot_rows(const SparsecCall *call, int64_t tile, int64_t row) {
  int64_t stride = dot_stride(call->k);
  F16 sums[MB];
  dot_tile<MB>(call, tile, static_cast<const Lane *>(call->scratch) + row * stride, stride, sums);
  add_outliers(call, row, MB, tile, sums);
  finish<X>(call, row, MB, tile * kRows, sums);
}

EXPORT void sparsec_run(const SparsecCall *call, int64_t tile_begin, int64_t tile_end) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    int64_t row = 0;
    if constexpr (kMostRows >= 4)
      for (; row + 4 <= call->m; row += 4) dot_rows<4>(call, tile, row);
    if constexpr (kMostRows >= 2)
      for (; row + 2 <= call->m; row += 2) dot_rows<2>(call, tile, row);
    for (; row < call->m; ++row) dot_rows<1>(call, tile, row);
  }
}
