// Loop "skip": x has zeros, and columns of W that meet none of its values are not read. Lanes are rows of W; the columns
// to read are known beforehand (call->active), so that what comes next is fetched without guessing. prepare puts the
// values of x beside each other as floats: [active column][row of x]. Expects Column from the layout.
constexpr int kTileVectors = kSpan / 16;
constexpr int kMostRows = kWide ? 2 : 1;  // rows of x whose sums fit the registers
constexpr int64_t kAtOnce = 64;           // columns that stay in the first-level cache while all rows of x pass by
constexpr int64_t kNext = 8;              // columns between a prefetch and its use
constexpr int kMostSums = 8;              // rows of x that the kernel takes

EXPORT int64_t sparsec_scratch(int64_t m, int64_t k) { return m * k * 4 + 64; }
EXPORT int64_t sparsec_prepare_units(int64_t, int64_t) { return 1; }
EXPORT void sparsec_prepare(const SparsecCall *call, int64_t, int64_t) {
  float *out = static_cast<float *>(call->scratch);
  const X *x = static_cast<const X *>(call->x);
  for (int64_t i = 0; i < call->active_count; ++i)
    for (int64_t r = 0; r < call->m; ++r) *out++ = to_float(x[r * call->x_stride + call->active[i]]);
}

// sums[v][r] += columns [begin, end) of the list, for MB rows of x from `row` on
template <int MB>
__attribute__((noinline)) void add_columns(const SparsecCall *call, int64_t tile, int64_t begin, int64_t end,
                                           int64_t row, F16 *sums) {
  const float *x = static_cast<const float *>(call->scratch) + row;
  F16 acc[MB][kTileVectors];
  for (int r = 0; r < MB; ++r)
    for (int v = 0; v < kTileVectors; ++v) acc[r][v] = sums[v * kMostSums + row + r];
  for (int64_t i = begin; i < end; ++i) {
    int64_t next = i + kNext < call->active_count ? i + kNext : i;
    Column(call, tile, call->active[next]).fetch();
    Column(call, tile, call->active[i]).each([&](int j, const F32 &w) __attribute__((always_inline)) {
      for (int r = 0; r < MB; ++r) {
        F16 xs = splat(x[i * call->m + r]);
        acc[r][2 * j] = fma(w.a, xs, acc[r][2 * j]);
        acc[r][2 * j + 1] = fma(w.b, xs, acc[r][2 * j + 1]);
      }
    });
  }
  for (int r = 0; r < MB; ++r)
    for (int v = 0; v < kTileVectors; ++v) sums[v * kMostSums + row + r] = acc[r][v];
}

// The end of the columns from `begin` on that are worked on together: of one group of scales, and kAtOnce at most.
INLINE int64_t stretch(const SparsecCall *call, int64_t begin, int64_t last) {
  int64_t end = begin + kAtOnce < last ? begin + kAtOnce : last;
  while (kGroupColumns && part_of(call->active[end - 1]) != part_of(call->active[begin])) --end;
  return end;
}

EXPORT void sparsec_run(const SparsecCall *call, int64_t tile_begin, int64_t tile_end) {
  int64_t last = call->active_count, m = call->m;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    F16 sums[kTileVectors * kMostSums], total[kTileVectors * kMostSums];
    for (int i = 0; i < kTileVectors * kMostSums; ++i) sums[i] = total[i] = zero16();
    for (int64_t begin = 0, end; begin < last; begin = end) {
      end = stretch(call, begin, last);
      int64_t row = 0;
      if constexpr (kMostRows == 2)
        for (; row + 2 <= m; row += 2) add_columns<2>(call, tile, begin, end, row, sums);
      for (; row < m; ++row) add_columns<1>(call, tile, begin, end, row, sums);
      int64_t part = part_of(call->active[begin]);
      if (end < last && (!kGroupColumns || part_of(call->active[end]) == part)) continue;
      for (int v = 0; v < kTileVectors && tile * kSpan + 16 * v < call->n; ++v)
        for (int64_t r = 0; r < m; ++r) {
          F16 &to = total[v * kMostSums + r], &from = sums[v * kMostSums + r];
          to = joined_rows(call, tile * kTileVectors + v, part, to, from), from = zero16();
        }
    }
    for (int v = 0; v < kTileVectors; ++v) {
      int64_t n0 = tile * kSpan + 16 * v;
      if (n0 >= call->n) break;
      add_outliers(call, 0, static_cast<int>(m), tile * kTileVectors + v, total + v * kMostSums);
      finish<X>(call, 0, static_cast<int>(m), n0, total + v * kMostSums);
    }
  }
}
