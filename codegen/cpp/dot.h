// Loop "dot": a few rows of x against each tile of W. prepare copies x to aligned rows that are padded with zeros to
// whole chunks, so that no kernel has a tail. Expects from the layout: kMostRows and
//   template <int MB> void dot_tile(const SparsecCall *, int64_t tile, const Lane *x, int64_t stride, F16 *sums);
// where sums[i] gets the 16 outputs of row i of x. Lane is what x is multiplied as: its own type, or float.

INLINE int64_t dot_stride(int64_t k) { return ceil_div(k, kChunk) * kChunk; }

EXPORT int64_t sparsec_scratch(int64_t m, int64_t k) { return m * dot_stride(k) * sizeof(Lane) + 64; }
EXPORT int64_t sparsec_prepare_units(int64_t m, int64_t) { return m; }

template <class T>
INLINE void copy_row(T *to, const T *from, int64_t k) {
  __builtin_memcpy(to, from, k * sizeof(T));
}
INLINE void copy_row(float *to, const bf16 *from, int64_t k) {
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) store16(to + i, load16(from + i));
  for (; i < k; ++i) to[i] = to_float(from[i]);
}

EXPORT void sparsec_prepare(const SparsecCall *call, int64_t begin, int64_t end) {
  int64_t stride = dot_stride(call->k);
  for (int64_t i = begin; i < end; ++i) {
    Lane *row = static_cast<Lane *>(call->scratch) + i * stride;
    copy_row(row, static_cast<const X *>(call->x) + i * call->x_stride, call->k);
    __builtin_memset(row + call->k, 0, (stride - call->k) * sizeof(Lane));
  }
}

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
