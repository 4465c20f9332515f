// Layout "panel": every position, zeros too, in the order the kernel reads: tile of 16 rows, step of columns, row, column
// of the step (one column in fp32, two in bf16). Lanes are rows of W, x is broadcast, nothing is summed across lanes.
// pack: values. prepare puts up to 16 rows of x side by side in the same way, so that one pointer reads them.

constexpr int kMostRows = kWide ? 8 : 4;  // rows of x whose sums fit the registers
constexpr int kSideBySide = 16;
constexpr int kPair = kWide ? 2 : 1;  // tiles that share each broadcast
// Steps whose part of W stays in the first-level cache while kRowsAtOnce rows of x pass by.
constexpr int64_t kStepsAtOnce = 256;
constexpr int kRowsAtOnce = 64;
constexpr int64_t kStepColumns = 4 / sizeof(X);
constexpr int64_t kW = kRows * kStepColumns;

INLINE int64_t steps_of(int64_t k) { return ceil_div(k, kStepColumns); }
// Rows of x side by side in scratch: kSideBySide, then the powers of two that are left.
INLINE int64_t block_rows(int64_t left) {
  int64_t rows = kSideBySide;
  while (rows > left) rows /= 2;
  return rows;
}

EXPORT int64_t sparsec_scratch(int64_t m, int64_t k) { return m * steps_of(k) * 4 + 64; }
EXPORT int64_t sparsec_prepare_units(int64_t m, int64_t) { return ceil_div(m, kSideBySide); }

// 16 steps of a row; a step is moved as the 4 bytes it is. Past the end of the row there are zeros.
INLINE F16 load_steps(const X *x, int64_t columns) {
  alignas(64) float bits[16];
  constexpr int64_t kAll = 16 * kStepColumns;
  if (columns < kAll) __builtin_memset(bits, 0, sizeof bits);
  __builtin_memcpy(bits, x, (columns < kAll ? columns : kAll) * sizeof(X));
  return load16(bits);
}

EXPORT void sparsec_prepare(const SparsecCall *call, int64_t begin, int64_t end) {
  int64_t steps = steps_of(call->k), last = end * kSideBySide < call->m ? end * kSideBySide : call->m;
  for (int64_t row = begin * kSideBySide, rows; row < last; row += rows) {
    rows = block_rows(last - row);
    float *out = static_cast<float *>(call->scratch) + row * steps;
    const X *x = static_cast<const X *>(call->x) + row * call->x_stride;
    if (rows == 1) {
      if (call->k % kStepColumns) out[steps - 1] = 0;
      __builtin_memcpy(out, x, call->k * sizeof(X));
      continue;
    }
    for (int64_t s = 0; s < steps; s += 16) {
      F16 r[16];
      int64_t at = s * kStepColumns;
      for (int64_t i = 0; i < 16; ++i)
        r[i] = i < rows ? load_steps(x + i * call->x_stride + at, call->k - at) : zero16();
      transpose16(r);
      int64_t count = steps - s < 16 ? steps - s : 16;
      for (int64_t i = 0; i < count; ++i) store_n(out + (s + i) * rows, static_cast<int>(rows), r[i]);
    }
  }
}

INLINE F16 step(F16 acc, const float *w, const float *x) { return fma(load16(w), splat(*x), acc); }
INLINE F16 step(F16 acc, const bf16 *w, const bf16 *x) { return mac_pairs(acc, w, x); }

// sums[tile][row] += `steps` steps of T tiles, `apart` values from each other, times MB of `wide` rows of x
template <int T, int MB>
__attribute__((noinline)) void panel_block(const X *w, int64_t apart, const X *x, int64_t wide, int64_t steps,
                                           F16 *sums) {
  constexpr int kSums = MB >= 4 ? 1 : 4 / MB;  // enough sums in flight that none waits for itself
  F16 acc[kSums][T][MB];
  for (int u = 0; u < kSums; ++u)
    for (int t = 0; t < T; ++t)
      for (int m = 0; m < MB; ++m) acc[u][t][m] = u ? zero16() : sums[t * kRowsAtOnce + m];
  int64_t s = 0;
  for (; s + kSums <= steps; s += kSums) {
    for (int u = 0; u < kSums; ++u, w += kW, x += wide * kStepColumns) {
      for (int t = 0; t < T; ++t) __builtin_prefetch(reinterpret_cast<const char *>(w + t * apart) + kAhead);
      for (int m = 0; m < MB; ++m)
        for (int t = 0; t < T; ++t) acc[u][t][m] = step(acc[u][t][m], w + t * apart, x + m * kStepColumns);
    }
  }
  for (; s < steps; ++s, w += kW, x += wide * kStepColumns)
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
  const X *w = pack_of<X>(call, 0) + tile * steps * kW, *x = static_cast<const X *>(call->scratch);
  for (int64_t begin = 0, end; begin < call->m; begin = end) {
    end = begin + kRowsAtOnce < call->m ? begin + kRowsAtOnce : call->m;
    F16 sums[T * kRowsAtOnce];
    for (int t = 0; t < T; ++t)
      for (int64_t i = 0; i < end - begin; ++i) sums[t * kRowsAtOnce + i] = zero16();
    for (int64_t s = 0; s < steps; s += kStepsAtOnce) {
      int64_t count = s + kStepsAtOnce < steps ? kStepsAtOnce : steps - s;
      for (int64_t row = begin, wide; row < end; row += wide) {
        wide = block_rows(end - row);
        const X *from = x + (row * steps + s * wide) * kStepColumns, *weight = w + s * kW;
        F16 *to = sums + (row - begin);
        switch (wide) {
          case 1: panel_block<T, 1>(weight, steps * kW, from, wide, count, to); break;
          case 2: panel_block<T, 2>(weight, steps * kW, from, wide, count, to); break;
          case 4: panel_block<T, 4>(weight, steps * kW, from, wide, count, to); break;
          default:
            for (int64_t i = 0; i < wide; i += kMostRows)
              panel_block<T, kMostRows>(weight, steps * kW, from + i * kStepColumns, wide, count, to + i);
        }
      }
    }
    for (int t = 0; t < T; ++t)
      finish<X>(call, begin, static_cast<int>(end - begin), (tile + t) * kRows, sums + t * kRowsAtOnce);
  }
}

EXPORT void sparsec_run(const SparsecCall *call, int64_t tile_begin, int64_t tile_end) {
  int64_t tile = tile_begin;
  for (; tile + kPair <= tile_end; tile += kPair) panel_tiles<kPair>(call, tile);
  for (; tile < tile_end; ++tile) panel_tiles<1>(call, tile);
}
