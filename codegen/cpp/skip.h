// Loop "skip": x has zeros, and columns of W that meet none of its values are not read. Lanes are rows of W. Several
// columns are read at once, each from one long piece of memory, as the hardware's prefetcher follows it; pieces of a few
// lines cost as much as reading what is between them. It follows only so many instructions (32 were followed, 64 not, on
// Zen 5), which is why a step has few loads. prepare puts the values of x beside each other as floats: [active column]
// [row of x]. Expects Column, kMostRows and the sizes of a step from the layout.
constexpr int kStepVectors = kStep / 16;  // vectors of the rows of W that are read at once
constexpr int kMostSums = 8;              // rows of x that the kernel takes
constexpr int kAtOnce = 8;                // columns
constexpr int64_t kChunkVectors = kChunk / 16, kSumChunks = 128;  // chunks of rows of W, all rows of x together

EXPORT int64_t sparsec_scratch(int64_t m, int64_t k) { return m * k * 4 + 64; }
EXPORT int64_t sparsec_prepare_units(int64_t, int64_t) { return 1; }
EXPORT void sparsec_prepare(const SparsecCall *call, int64_t, int64_t) {
  float *out = static_cast<float *>(call->scratch);
  const X *x = static_cast<const X *>(call->x);
  for (int64_t i = 0; i < call->active_count; ++i)
    for (int64_t r = 0; r < call->m; ++r) *out++ = to_float(x[r * call->x_stride + call->active[i]]);
}

// sums[row of x][vector of rows of W] += `count` columns of the list from `begin` on, for MB rows of x from `row` on
template <int MB, int COUNT>
INLINE void add_columns(const SparsecCall *call, int64_t chunk, int64_t chunks, int64_t begin, int64_t row, F16 *sums) {
  const float *x = static_cast<const float *>(call->scratch) + begin * call->m + row;
  const int64_t vectors = chunks * kChunkVectors;
  Column column[COUNT];
  F16 xs[COUNT][MB];
  int64_t ahead[COUNT];  // how far behind a column is the one that is read after it
  for (int c = 0; c < COUNT; ++c) {
    int64_t after = begin + c + kAtOnce < call->active_count ? begin + c + kAtOnce : begin + c;
    column[c] = Column(call, chunk, call->active[begin + c]);
    ahead[c] = Column(call, chunk, call->active[after]).here() - column[c].here();
    for (int r = 0; r < MB; ++r) xs[c][r] = splat(x[c * call->m + r]);
  }
  for (int64_t i = 0; i < vectors; i += kStepVectors) {
    F16 acc[MB][kStepVectors];
    for (int r = 0; r < MB; ++r)
      for (int v = 0; v < kStepVectors; ++v) acc[r][v] = sums[r * vectors + i + v];
    for (int c = 0; c < COUNT; ++c) {
      for (int64_t b = i ? 0 : -kFront; b < kStepSize; b += 64)
        __builtin_prefetch(column[c].here() + ahead[c] + b);
      column[c].next([&](int j, const F32 &w) __attribute__((always_inline)) {
        for (int r = 0; r < MB; ++r) {
          acc[r][2 * j] = fma(w.a, xs[c][r], acc[r][2 * j]);
          acc[r][2 * j + 1] = fma(w.b, xs[c][r], acc[r][2 * j + 1]);
        }
      });
    }
    for (int r = 0; r < MB; ++r)
      for (int v = 0; v < kStepVectors; ++v) sums[r * vectors + i + v] = acc[r][v];
  }
}

template <int MB>
__attribute__((noinline)) void add_group(const SparsecCall *call, int64_t chunk, int64_t chunks, int64_t begin, int64_t end,
                                         int64_t row, F16 *sums) {
  if (end - begin == kAtOnce) return add_columns<MB, kAtOnce>(call, chunk, chunks, begin, row, sums);
  for (; begin < end; ++begin) add_columns<MB, 1>(call, chunk, chunks, begin, row, sums);
}

// The end of the columns from `begin` on that are read together: kAtOnce, and of one group of scales.
INLINE int64_t together(const SparsecCall *call, int64_t begin) {
  int64_t end = begin + kAtOnce < call->active_count ? begin + kAtOnce : call->active_count;
  while (kGroupColumns && part_of(call->active[end - 1]) != part_of(call->active[begin])) --end;
  return end;
}

// The outputs of `chunks` chunks of rows of W.
INLINE void run_block(const SparsecCall *call, int64_t chunk, int64_t chunks, F16 *sums, F16 *total) {
  int64_t last = call->active_count, m = call->m;
  const int64_t of_row = chunks * kChunkVectors;
  for (int64_t i = 0; i < m * of_row; ++i) sums[i] = total[i] = zero16();
  int64_t vectors = ceil_div(call->n - chunk * kChunk, 16);
  vectors = vectors < of_row ? vectors : of_row;
  for (int64_t begin = 0, end; begin < last; begin = end) {
    end = together(call, begin);
    int64_t row = 0;
    if constexpr (kMostRows == 4)
      for (; row + 4 <= m; row += 4) add_group<4>(call, chunk, chunks, begin, end, row, sums + row * of_row);
    if constexpr (kMostRows >= 2)
      for (; row + 2 <= m; row += 2) add_group<2>(call, chunk, chunks, begin, end, row, sums + row * of_row);
    for (; row < m; ++row) add_group<1>(call, chunk, chunks, begin, end, row, sums + row * of_row);
    int64_t part = part_of(call->active[begin]);
    if (end < last && (!kGroupColumns || part_of(call->active[end]) == part)) continue;
    for (int64_t r = 0; r < m; ++r)
      for (int64_t v = 0; v < vectors; ++v) {
        F16 &to = total[r * of_row + v], &from = sums[r * of_row + v];
        to = joined_rows(call, chunk * kChunkVectors + v, part, to, from), from = zero16();
      }
  }
  for (int64_t v = 0; v < vectors; ++v) {
    F16 out[kMostSums];
    for (int64_t r = 0; r < m; ++r) out[r] = total[r * of_row + v];
    add_outliers(call, 0, static_cast<int>(m), chunk * kChunkVectors + v, out);
    finish<X>(call, 0, static_cast<int>(m), chunk * kChunk + 16 * v, out);
  }
}

EXPORT void sparsec_run(const SparsecCall *call, int64_t tile_begin, int64_t tile_end) {
  if (!call->m) return;
  alignas(64) F16 sums[kSumChunks * kChunkVectors], total[kSumChunks * kChunkVectors];
  int64_t chunk = tile_begin * tile_chunks(call), last = tile_end * tile_chunks(call), all = ceil_div(call->n, kChunk);
  const int64_t most = kSumChunks / call->m < kBlockChunks ? kSumChunks / call->m : kBlockChunks;
  if (last > all) last = all;
  while (chunk < last) {
    int64_t chunks = last - chunk < most ? last - chunk : most;
    run_block(call, chunk, chunks, sums, total);
    chunk += chunks;
  }
}
