// Loop "unpack": the dense weight back, tile by tile, for calls with so many rows of x that a dense product of the
// decoded weight is faster than skipping its zeros. Expects what list.h says from the layout. y is dense rows of W in
// the type of x, K to a row: its first row is row call->m of W, and rows past the end of W are not written.

EXPORT int64_t sparsec_scratch(int64_t, int64_t) { return 0; }
EXPORT int64_t sparsec_prepare_units(int64_t, int64_t) { return 0; }
EXPORT void sparsec_prepare(const SparsecCall *, int64_t, int64_t) {}

EXPORT void sparsec_run(const SparsecCall *call, int64_t tile_begin, int64_t tile_end) {
  alignas(64) float dense[kRows * kChunk];
  List list;
  for (int64_t t = tile_begin; t < tile_end; ++t) {
    Cursor cursor(call, t);
    int64_t rows = call->n - t * kRows < kRows ? call->n - t * kRows : kRows;
    for (int64_t k = 0; k < call->k; k += kChunk) {
      decode(call, cursor, k / kChunk, list);
      __builtin_memset(dense, 0, sizeof dense);
      for (int l = 0; l < kRows; ++l) {
        const float *value = list.value + list.first[l];
        const uint32_t *column = list.column + list.first[l];
        float *row = dense + list.row[l] * kChunk;
        // Added, not stored: padding is a zero at some column, maybe one that holds a value.
        for (int i = 0; i < list.count[l]; ++i) row[column[i * kStep]] += value[i * kStep];
      }
      int64_t left = call->k - k < kChunk ? call->k - k : kChunk;
      for (int64_t r = 0; r < rows; ++r) {
        X *out = static_cast<X *>(call->y) + (t * kRows + r - call->m) * call->y_stride + k;
        for (int64_t c = 0; c < left; c += 16)
          store_n(out + c, left - c < 16 ? static_cast<int>(left - c) : 16, load16(dense + r * kChunk + c));
      }
    }
    write_outliers(call, t, static_cast<X *>(call->y) + (t * kRows - call->m) * call->y_stride);
  }
}
