// Layout "panel": every position, zeros too, in the order the kernel reads: tile of 16 rows, step of columns, row, column
// of the step (one column in fp32, two in bf16). Lanes are rows of W, x is broadcast, nothing is summed across lanes.
// pack: values. prepare puts up to kMostRows rows of x side by side in the same way, so that one pointer reads them.

constexpr int kMostRows = kWide ? 8 : 4;
constexpr int kPair = kWide ? 2 : 1;  // tiles that share each broadcast
// Steps whose part of W stays in the first-level cache while kRowsAtOnce rows of x pass by.
constexpr int64_t kStepsAtOnce = 256;
constexpr int kRowsAtOnce = 64;
constexpr int64_t kStepColumns = 4 / sizeof(Value);
constexpr int64_t kW = kRows * kStepColumns;

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

// sums[tile][row] += `steps` steps of T tiles, `apart` values from each other, times MB rows of x
template <int T, int MB>
__attribute__((noinline)) void panel_block(const Value *w, int64_t apart, const Value *x, int64_t steps, F16 *sums) {
  constexpr int kSums = MB >= 4 ? 1 : 4 / MB;  // enough sums in flight that none waits for itself
  F16 acc[kSums][T][MB];
  for (int u = 0; u < kSums; ++u)
    for (int t = 0; t < T; ++t)
      for (int m = 0; m < MB; ++m) acc[u][t][m] = u ? zero16() : sums[t * kRowsAtOnce + m];
  int64_t s = 0;
  for (; s + kSums <= steps; s += kSums) {
    for (int u = 0; u < kSums; ++u, w += kW, x += MB * kStepColumns) {
      for (int t = 0; t < T; ++t) __builtin_prefetch(reinterpret_cast<const char *>(w + t * apart) + kAhead);
      for (int m = 0; m < MB; ++m)
        for (int t = 0; t < T; ++t) acc[u][t][m] = step(acc[u][t][m], w + t * apart, x + m * kStepColumns);
    }
  }
  for (; s < steps; ++s, w += kW, x += MB * kStepColumns)
    for (int m = 0; m < MB; ++m)
      for (int t = 0; t < T; ++t) acc[0][t][m] = step(acc[0][t][m], w + t * apart, x + m * kStepColumns);
  for (int t = 0; t < T; ++t) {
    for (int m = 0; m < MB; ++m) {
      for (int u = 1; u < kSums; ++u) acc[0][t][m] = add(acc[0][t][m], acc[u][t][m]);
      sums[t * kRowsAtOnce + m] = acc[0][t][m];
    }
  }
}

template <int T>
INLINE void panel_tiles(const SparsecCall *call, int64_t tile) {
  int64_t steps = steps_of(call->k);
  const Value *w = pack_of<Value>(call, 0) + tile * steps * kW, *x = static_cast<const Value *>(call->scratch);
  for (int64_t begin = 0, end; begin < call->m; begin = end) {
    end = begin + kRowsAtOnce < call->m ? begin + kRowsAtOnce : call->m;
    F16 sums[T * kRowsAtOnce];
    for (int t = 0; t < T; ++t)
      for (int64_t i = 0; i < end - begin; ++i) sums[t * kRowsAtOnce + i] = zero16();
    for (int64_t s = 0; s < steps; s += kStepsAtOnce) {
      int64_t count = s + kStepsAtOnce < steps ? kStepsAtOnce : steps - s;
      for (int64_t row = begin, rows; row < end; row += rows) {
        rows = block_rows(call->m - row);
        const Value *from = x + (row * steps + s * rows) * kStepColumns;
        F16 *to = sums + (row - begin);
        switch (rows) {
          case 1: panel_block<T, 1>(w + s * kW, steps * kW, from, count, to); break;
          case 2: panel_block<T, 2>(w + s * kW, steps * kW, from, count, to); break;
          case 4: panel_block<T, 4>(w + s * kW, steps * kW, from, count, to); break;
          default: panel_block<T, kMostRows>(w + s * kW, steps * kW, from, count, to);
        }
      }
    }
    for (int t = 0; t < T; ++t)
      finish<Value>(call, begin, static_cast<int>(end - begin), (tile + t) * kRows, sums + t * kRowsAtOnce);
  }
}

EXPORT void sparsec_run(const SparsecCall *call, int64_t tile_begin, int64_t tile_end) {
  int64_t tile = tile_begin;
  for (; tile + kPair <= tile_end; tile += kPair) panel_tiles<kPair>(call, tile);
  for (; tile < tile_end; ++tile) panel_tiles<1>(call, tile);
}
