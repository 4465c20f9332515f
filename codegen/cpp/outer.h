// Loop "outer": rows of x in the vector. prepare writes x transposed, in fp32, in blocks of up to 16 kMostVectors rows:
// block[column][row]. Each kept weight is broadcast and multiplies one column of x. The columns are worked through in
// chunks of 128, whose part of x stays in L1 while kTiles tiles of W use it. Expects what list.h says from the layout.

constexpr int kTiles = 4;
constexpr int kMostVectors = kVectors;

INLINE int64_t outer_rows(int64_t m) { return ceil_div(m, 16) * 16; }
// Lists hold zero values at any column of their chunk, past the end too; x is zero there, for 0 times what memory held
// before could be NaN.
INLINE int64_t outer_columns(int64_t k) { return ceil_div(k, kChunk) * kChunk; }
constexpr int64_t kBlock = 16 * kMostVectors;

EXPORT int64_t sparsec_scratch(int64_t m, int64_t k) { return outer_rows(m) * outer_columns(k) * sizeof(float) + 64; }
EXPORT int64_t sparsec_prepare_units(int64_t m, int64_t k) { return ceil_div(m, kBlock) * ceil_div(k, kChunk); }

EXPORT void sparsec_prepare(const SparsecCall *call, int64_t begin, int64_t end) {
  int64_t chunks = ceil_div(call->k, kChunk);
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t m0 = unit / chunks * kBlock, k0 = unit % chunks * kChunk;
    int64_t width = outer_rows(call->m - m0 < kBlock ? call->m - m0 : kBlock);
    float *block = static_cast<float *>(call->scratch) + m0 * outer_columns(call->k);
    int64_t k1 = k0 + kChunk < call->k ? k0 + kChunk : outer_columns(call->k);
    for (int64_t j = 0; j < width; j += 16) {
      for (int64_t k = k0; k < k1; k += 16) {
        int64_t left = call->k - k;
        int columns = left < 0 ? 0 : left < 16 ? static_cast<int>(left) : 16;
        F16 r[16];
        for (int i = 0; i < 16; ++i) {
          int64_t row = m0 + j + i;
          const X *x = static_cast<const X *>(call->x) + row * call->x_stride + k;
          r[i] = row < call->m && columns ? load_n(x, columns) : zero16();
        }
        transpose16(r);
        for (int i = 0; i < 16; ++i) store16(block + (k + i) * width + j, r[i]);
      }
    }
  }
}

// acc of kTogether rows += the sum over i of value[i] * x[column[i]]; the first list is the longest, the others hold
// zeros behind their end. Several sums are kept where one would wait for itself.
template <int NV>
INLINE void outer_lists(float *acc, const float *x, const List &list, int l) {
  constexpr int R = kTogether, kSums = R * NV >= 4 ? 1 : 4 / (R * NV), kAtOnce = R >= kUnroll ? 1 : kUnroll / R;
  const float *value[R];
  const uint32_t *column[R];
  F16 a[kSums][R][NV];
  for (int r = 0; r < R; ++r) {
    value[r] = list.value + list.first[l + r], column[r] = list.column + list.first[l + r];
    for (int u = 0; u < kSums; ++u)
      for (int j = 0; j < NV; ++j) a[u][r][j] = u ? zero16() : load16(acc + list.row[l + r] * (16 * NV) + 16 * j);
  }
  for (int i = 0, count = list.count[l]; i < count; i += kAtOnce) {
#pragma GCC unroll 4
    for (int u = 0; u < kAtOnce; ++u) {
      for (int r = 0; r < R; ++r) {
        F16 w = splat(value[r][(i + u) * kStep]);
        const float *xs = x + static_cast<int64_t>(column[r][(i + u) * kStep]) * (16 * NV);
        for (int j = 0; j < NV; ++j) a[u % kSums][r][j] = fma(w, load16(xs + 16 * j), a[u % kSums][r][j]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < NV; ++j) {
      for (int u = 1; u < kSums; ++u) a[0][r][j] = add(a[0][r][j], a[u][r][j]);
      store16(acc + list.row[l + r] * (16 * NV) + 16 * j, a[0][r][j]);
    }
  }
}

template <int NV>
__attribute__((noinline)) void outer_tiles(const SparsecCall *call, int64_t m0, int64_t begin, int64_t end) {
  alignas(64) float acc[kTiles * kRows * 16 * NV] = {};
  Cursor cursor[kTiles];
  List list;
  for (int64_t t = begin; t < end; ++t) cursor[t - begin] = Cursor(call, t);
  const float *x = static_cast<const float *>(call->scratch) + m0 * outer_columns(call->k);
  for (int64_t k = 0; k < call->k; k += kChunk) {
    for (int64_t t = 0; t < end - begin; ++t) {
      decode(call, cursor[t], k / kChunk, list);
      for (int l = 0; l < kRows; l += kTogether) outer_lists<NV>(acc + t * kRows * 16 * NV, x + k * 16 * NV, list, l);
    }
  }
  for (int64_t t = 0; t < end - begin; ++t) {
    add_outliers_transposed<NV>(call, begin + t, x, acc + t * kRows * 16 * NV);
    for (int j = 0; j < NV; ++j) {
      F16 r[16];
      for (int i = 0; i < 16; ++i) r[i] = load16(acc + ((t * kRows + i) * NV + j) * 16);
      transpose16(r);
      int64_t row = m0 + 16 * j, left = call->m - row;
      finish<X>(call, row, left < 16 ? static_cast<int>(left) : 16, (begin + t) * kRows, r);
    }
  }
}

EXPORT void sparsec_run(const SparsecCall *call, int64_t tile_begin, int64_t tile_end) {
  for (int64_t t = tile_begin; t < tile_end; t += kTiles) {
    int64_t end = t + kTiles < tile_end ? t + kTiles : tile_end;
    for (int64_t m0 = 0; m0 < call->m; m0 += kBlock) {
      int64_t vectors = ceil_div(call->m - m0, 16);
      if (vectors >= kMostVectors) outer_tiles<kMostVectors>(call, m0, t, end);
      else if (vectors == 1) outer_tiles<1>(call, m0, t, end);
      else if constexpr (kMostVectors > 2) vectors == 2 ? outer_tiles<2>(call, m0, t, end) : outer_tiles<3>(call, m0, t, end);
    }
  }
}
