// Layout "panel": every position, zeros too, in the order the kernel reads: tile of 16 rows, step of columns, row, column
// of the step (one column in fp32, two in bf16). Lanes are rows of W, x is broadcast, nothing is summed across lanes.
// pack: values. prepare puts up to kMostRows rows of x side by side in the same way, so that one pointer reads them.

constexpr int kMostRows = kWide ? 16 : 4;
constexpr int64_t kStepColumns = 4 / sizeof(Value);

INLINE int64_t steps_of(int64_t k) { return ceil_div(k, kStepColumns); }
// Rows are worked on in blocks: of kMostRows, then of the powers of two that are left.
INLINE int64_t block_rows(int64_t left) {
  int64_t rows = kMostRows;
  while (rows > left) rows /= 2;
  return rows;
}

EXPORT int64_t sparsec_scratch(int64_t m, int64_t k) { return m * steps_of(k) * 4 + 64; }
EXPORT int64_t sparsec_prepare_units(int64_t m, int64_t) { return m; }

EXPORT void sparsec_prepare(const SparsecCall *call, int64_t begin, int64_t end) {
  int64_t steps = steps_of(call->k);
  for (int64_t row = 0, rows; row < end; row += rows) {
    rows = block_rows(call->m - row);
    for (int64_t i = begin > row ? begin - row : 0; i < rows && row + i < end; ++i) {
      const Value *x = static_cast<const Value *>(call->x) + (row + i) * call->x_stride;
      Value *out = static_cast<Value *>(call->scratch) + (row * steps + i) * kStepColumns;
      for (int64_t k = 0; k < call->k; ++k) out[k / kStepColumns * rows * kStepColumns + k % kStepColumns] = x[k];
      if (call->k % kStepColumns) out[call->k / kStepColumns * rows * kStepColumns + 1] = Value{};
    }
  }
}

INLINE F16 step(F16 acc, const float *w, const float *x) { return fma(load16(w), splat(*x), acc); }
INLINE F16 step(F16 acc, const bf16 *w, const bf16 *x) { return mac_pairs(acc, w, x); }

template <int MB>
__attribute__((noinline)) void panel_rows(const SparsecCall *call, int64_t tile, int64_t row) {
  constexpr int kSums = MB >= 8 ? 1 : 8 / MB;  // enough sums in flight that none waits for itself
  constexpr int64_t kW = kRows * kStepColumns, kX = MB * kStepColumns;
  int64_t steps = steps_of(call->k), s = 0;
  const Value *w = pack_of<Value>(call, 0) + tile * steps * kW;
  const Value *x = static_cast<const Value *>(call->scratch) + row * steps * kStepColumns;
  F16 acc[kSums][MB];
  for (int u = 0; u < kSums; ++u)
    for (int m = 0; m < MB; ++m) acc[u][m] = zero16();
  for (; s + kSums <= steps; s += kSums) {
    for (int u = 0; u < kSums; ++u, w += kW, x += kX) {
      __builtin_prefetch(reinterpret_cast<const char *>(w) + kAhead);
      for (int m = 0; m < MB; ++m) acc[u][m] = step(acc[u][m], w, x + m * kStepColumns);
    }
  }
  for (; s < steps; ++s, w += kW, x += kX)
    for (int m = 0; m < MB; ++m) acc[0][m] = step(acc[0][m], w, x + m * kStepColumns);
  for (int u = 1; u < kSums; ++u)
    for (int m = 0; m < MB; ++m) acc[0][m] = add(acc[0][m], acc[u][m]);
  finish<Value>(call, row, MB, tile * kRows, acc[0]);
}

EXPORT void sparsec_run(const SparsecCall *call, int64_t tile_begin, int64_t tile_end) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for (int64_t row = 0, rows; row < call->m; row += rows) {
      rows = block_rows(call->m - row);
      switch (rows) {
        case 1: panel_rows<1>(call, tile, row); break;
        case 2: panel_rows<2>(call, tile, row); break;
        case 4: panel_rows<4>(call, tile, row); break;
        case 8: panel_rows<8>(call, tile, row); break;
        default: panel_rows<kMostRows>(call, tile, row);
      }
    }
  }
}
