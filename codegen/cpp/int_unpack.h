// Loop "unpack" of integer kernels: the dense weight back, in rows as unpack.h writes them. A layout gives `fill`.

EXPORT int64_t sparsec_scratch(int64_t, int64_t) { return 0; }
EXPORT int64_t sparsec_prepare_units(int64_t, int64_t) { return 0; }
EXPORT void sparsec_prepare(const SparsecCall *, int64_t, int64_t) {}

// Rows of a tile, to where the call wants its columns [k, k + kWide).
INLINE void write_rows(const SparsecCall *call, int64_t tile, int64_t k, const float *dense) {
  int64_t rows = call->n - tile * kRows < kRows ? call->n - tile * kRows : kRows;
  int64_t left = call->k - k < kWide ? call->k - k : kWide;
  for (int64_t r = 0; r < rows; ++r) {
    X *out = static_cast<X *>(call->y) + (tile * kRows + r - call->m) * call->y_stride + k;
    for (int64_t c = 0; c < left; c += 16)
      store_n(out + c, left - c < 16 ? static_cast<int>(left - c) : 16, load16(dense + r * kWide + c));
  }
}

EXPORT void sparsec_run(const SparsecCall *call, int64_t tile_begin, int64_t tile_end) {
  alignas(64) float dense[kRows * kWide];
  for (int64_t t = tile_begin; t < tile_end; ++t) {
    Source from(call, t);
    for (int64_t k = 0; k < call->k; k += kWide) {
      from.fill(call, t, k, dense);
      write_rows(call, t, k, dense);
    }
  }
}
