// Outliers beside a coded weight, added to the sums before the epilogue, so that y is written once. Behind the scales
// and zero points a pack has: the first quad of each tile and one more (int32); of each quad its row in the tile and
// four columns (uint16, or int32 for more than 65536 columns); and four values, of the type of x. A quad holds outliers
// of one row; the first quads of all rows come before the second ones, so that neighbours add to different sums and
// none waits for the other, and a tile is one loop, whatever number of outliers each row has.

constexpr int kQuadPlaces = 5;
typedef float Four __attribute__((vector_size(16)));

INLINE Four four(float a, float b, float c, float d) { return Four{a, b, c, d}; }
template <class T>
INLINE Four four(const T *p) { return four(to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])); }

// Between the first bytes of two tiles there is much else to read, which no prefetcher of a machine jumps over.
INLINE void fetch_outliers(const SparsecCall *call, int64_t tile) {
  const int32_t *begin = pack_of<int32_t>(call, kTail + 2) + tile;
  if (begin[0] == begin[1]) return;
  int64_t place = kQuadPlaces * (call->k > 65536 ? 4 : 2);
  const char *places = pack_of<char>(call, kTail + 3), *values = pack_of<char>(call, kTail + 4);
  for (int64_t i = begin[0] * place; i < begin[1] * place + 63; i += 64) __builtin_prefetch(places + i);
  int64_t value = 4 * sizeof(X);
  for (int64_t i = begin[0] * value; i < begin[1] * value + 63; i += 64) __builtin_prefetch(values + i);
}

template <class Place>
INLINE void add_outliers_of(const SparsecCall *call, int64_t row, int rows, const int32_t *begin, F16 *sums) {
  for (int i = 0; i < rows; ++i) {
    const X *x = static_cast<const X *>(call->x) + (row + i) * call->x_stride;
    const Place *at = pack_of<Place>(call, kTail + 3) + kQuadPlaces * static_cast<int64_t>(begin[0]);
    const X *value = pack_of<X>(call, kTail + 4) + 4 * static_cast<int64_t>(begin[0]);
    Four sum[kRows] = {};
    for (int32_t q = begin[0]; q < begin[1]; ++q, at += kQuadPlaces, value += 4)
      sum[at[0]] += four(value) * four(to_float(x[at[1]]), to_float(x[at[2]]), to_float(x[at[3]]), to_float(x[at[4]]));
    alignas(64) float whole[kRows];
    for (int r = 0; r < kRows; ++r) whole[r] = (sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]);
    sums[i] = add(sums[i], load16(whole));
  }
}
// sums[i] has the 16 outputs of row `row` + i of x.
INLINE void add_outliers(const SparsecCall *call, int64_t row, int rows, int64_t tile, F16 *sums) {
  const int32_t *begin = pack_of<int32_t>(call, kTail + 2) + tile;
  if (begin[0] == begin[1]) return;
  if (call->k > 65536) add_outliers_of<int32_t>(call, row, rows, begin, sums);
  else add_outliers_of<uint16_t>(call, row, rows, begin, sums);
}

// acc[r][0 .. 16 NV) has the outputs of row r of the tile; x is transposed in blocks of 16 NV rows.
template <int NV, class Place>
INLINE void add_outliers_transposed_of(const SparsecCall *call, const int32_t *begin, const float *x, float *acc) {
  const Place *at = pack_of<Place>(call, kTail + 3) + kQuadPlaces * static_cast<int64_t>(begin[0]);
  const X *value = pack_of<X>(call, kTail + 4) + 4 * static_cast<int64_t>(begin[0]);
  for (int32_t q = begin[0]; q < begin[1]; ++q, at += kQuadPlaces, value += 4) {
    float *to = acc + at[0] * (16 * NV);
    for (int j = 0; j < NV; ++j) {
      F16 sum = load16(to + 16 * j);
      for (int u = 0; u < 4; ++u)
        sum = fma(splat(to_float(value[u])), load16(x + static_cast<int64_t>(at[1 + u]) * (16 * NV) + 16 * j), sum);
      store16(to + 16 * j, sum);
    }
  }
}
template <int NV>
INLINE void add_outliers_transposed(const SparsecCall *call, int64_t tile, const float *x, float *acc) {
  const int32_t *begin = pack_of<int32_t>(call, kTail + 2) + tile;
  if (begin[0] == begin[1]) return;
  if (call->k > 65536) add_outliers_transposed_of<NV, int32_t>(call, begin, x, acc);
  else add_outliers_transposed_of<NV, uint16_t>(call, begin, x, acc);
}
