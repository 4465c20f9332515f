// Outliers beside a coded weight, added to the sums before the epilogue, so that y is written once. Behind the scales
// and zero points a pack has: the first quad of each tile and one more (int32); of each quad its row in the tile and
// four columns (uint16, or int32 for more than 65536 columns); and four values, of the type of x. A quad holds outliers
// of one row; the first quads of all rows come before the second ones, so that neighbours add to different sums and
// none waits for the other, and a tile is one loop, whatever number of outliers each row has.

constexpr int kQuadPlaces = 5;
typedef float Four __attribute__((vector_size(16)));

template <class T>
INLINE Four four(const T *p) {
  return Four{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
// x at four places. Compilers collect them in general registers, which is most of the work.
template <class T, class Place>
INLINE Four four_of(const T *x, const Place *at) {
  return Four{to_float(x[at[0]]), to_float(x[at[1]]), to_float(x[at[2]]), to_float(x[at[3]])};
}
#ifdef __SSE4_1__
template <class Place>
INLINE Four four_of(const float *x, const Place *at) {
  Four v = _mm_load_ss(x + at[0]);
  v = _mm_insert_ps(v, _mm_load_ss(x + at[1]), 0x10);
  v = _mm_insert_ps(v, _mm_load_ss(x + at[2]), 0x20);
  return _mm_insert_ps(v, _mm_load_ss(x + at[3]), 0x30);
}
template <class Place>
INLINE Four four_of(const bf16 *x, const Place *at) {  // the upper half of a float
  __m128i v = _mm_insert_epi16(_mm_setzero_si128(), x[at[0]].bits, 1);
  v = _mm_insert_epi16(v, x[at[1]].bits, 3);
  v = _mm_insert_epi16(v, x[at[2]].bits, 5);
  return reinterpret_cast<Four>(_mm_insert_epi16(v, x[at[3]].bits, 7));
}
#endif

template <class Place>
INLINE void add_outliers_of(const SparsecCall *call, int64_t row, int rows, const int32_t *begin, F16 *sums) {
  for (int i = 0; i < rows; ++i) {
    const X *x = static_cast<const X *>(call->x) + (row + i) * call->x_stride;
    const Place *at = pack_of<Place>(call, kTail + 3) + kQuadPlaces * static_cast<int64_t>(begin[0]);
    const X *value = pack_of<X>(call, kTail + 4) + 4 * static_cast<int64_t>(begin[0]);
    asm("" : "+r"(x));  // one register, not a sum that is worked out for each place
    Four sum[kRows] = {};
    for (int32_t q = begin[0]; q < begin[1]; ++q, at += kQuadPlaces, value += 4)
      sum[at[0]] += four(value) * four_of(x, at + 1);
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

// Outliers to their places in the dense rows of a tile, which begin at `y`. What fills a quad up is a zero.
template <class Place>
INLINE void write_outliers_of(const SparsecCall *call, const int32_t *begin, X *y) {
  const Place *at = pack_of<Place>(call, kTail + 3) + kQuadPlaces * static_cast<int64_t>(begin[0]);
  const X *value = pack_of<X>(call, kTail + 4) + 4 * static_cast<int64_t>(begin[0]);
  for (int32_t q = begin[0]; q < begin[1]; ++q, at += kQuadPlaces, value += 4)
    for (int i = 0; i < 4; ++i)
      if (to_float(value[i]) != 0.f) y[at[0] * call->y_stride + at[1 + i]] = value[i];
}
INLINE void write_outliers(const SparsecCall *call, int64_t tile, X *y) {
  const int32_t *begin = pack_of<int32_t>(call, kTail + 2) + tile;
  if (call->k > 65536) write_outliers_of<int32_t>(call, begin, y);
  else write_outliers_of<uint16_t>(call, begin, y);
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
