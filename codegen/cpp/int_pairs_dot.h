// The loop "dot" of the layout "pairs": x in the places of what each row keeps.

constexpr int kMost = 64;

// What all factors of x leave in the sums of a group before anything is added to them.
INLINE I16 start_of(const SparsecCall *call, const Activations &to, int64_t tile, int64_t group) {
  return mul_i(load_i16(pack_of<int32_t>(call, 2) + (tile * to.groups + group) * kRows), splat_i(-kXOffset));
}
INLINE F16 factor_of(const SparsecCall *call, const Activations &to, int64_t tile, int64_t group) {
  return load16(pack_of<float>(call, 1) + (kGroup ? tile * to.groups + group : tile) * kRows);
}
INLINE int64_t group_end(const Activations &to, int64_t group) {
  int64_t end = (group + 1) * kGroupColumns;
  return end < to.columns ? end : to.columns;
}

INLINE void write(const SparsecCall *call, const Activations &to, int64_t row, int rows, int64_t tile, F16 *done) {
  for (int m = 0; m < rows; ++m) done[m] = mul(done[m], splat(to.scale[row + m]));
  finish<X>(call, row, rows, tile * kRows, done);
}

template <int T, int MB>
__attribute__((noinline)) void pairs_times_x(const SparsecCall *call, int64_t tile, int64_t row) {
  constexpr int kSums = T * MB >= 4 ? 1 : 4 / (T * MB);  // enough sums in flight that none waits for itself
  Activations to(call);
  const int8_t *x = to.x + row * to.columns;
  Reader from[T];
  F16 done[T][MB];
  UNROLL for (int t = 0; t < T; ++t) {
    from[t] = Reader(call, tile + t);
    UNROLL for (int m = 0; m < MB; ++m) done[t][m] = zero16();
  }
  for (int64_t group = 0, k = 0; group < to.groups; ++group) {
    I16 acc[kSums][T][MB];
    UNROLL for (int t = 0; t < T; ++t) {
      from[t].enter(group);
      I16 start = start_of(call, to, tile + t, group);
      UNROLL for (int u = 0; u < kSums; ++u)
        UNROLL for (int m = 0; m < MB; ++m) acc[u][t][m] = u ? zero_i16() : start;
    }
    for (int64_t end = group_end(to, group); k < end; k += kQuadColumns) {
      Bytes w[T][kQuad], places[T];
      UNROLL for (int t = 0; t < T; ++t) places[t] = from[t].next(w[t]);
      UNROLL for (int i = 0; i < kQuad; ++i) {
        Bytes at[T];
        UNROLL for (int t = 0; t < T; ++t) at[t] = places_of(places[t], i);
        UNROLL for (int m = 0; m < MB; ++m) {
          Bytes eight = eight_columns(x + m * to.columns + k + 8 * i);
          UNROLL for (int t = 0; t < T; ++t)
            acc[i % kSums][t][m] = dot_signed(acc[i % kSums][t][m], at_places(eight, at[t]), w[t][i]);
        }
      }
    }
    UNROLL for (int t = 0; t < T; ++t) {
      F16 factor = factor_of(call, to, tile + t, group);
      UNROLL for (int m = 0; m < MB; ++m) {
        UNROLL for (int u = 1; u < kSums; ++u) acc[0][t][m] = add_i(acc[0][t][m], acc[u][t][m]);
        done[t][m] = fma(to_floats(acc[0][t][m]), factor, done[t][m]);
      }
    }
  }
  UNROLL for (int t = 0; t < T; ++t) write(call, to, row, MB, tile + t, done[t]);
}

#if TILES
// The same on tiles of 16 rows of x by 16 rows of W, for which zeros are put back.
constexpr int64_t kAtOnce = 512;  // columns that are decoded into the first-level cache while the rows of x pass by

INLINE void decode(Reader &from, int64_t columns, uint8_t *out) {
  for (int64_t k = 0; k < columns; k += kQuadColumns) {
    Bytes w[kQuad], places = from.next(w);
    UNROLL for (int i = 0; i < kQuad; ++i, out += 128) dense_steps(w[i], places_of(places, i), out);
  }
}

template <int T>
__attribute__((noinline)) void tiles_of_pairs(const SparsecCall *call, int64_t tile, int64_t row, int rows) {
  Activations to(call);
  Reader from[T];
  F16 done[T][kMost];
  I16 open[T][kMost];
  alignas(64) uint8_t decoded[T][16 * kAtOnce];
  for (int t = 0; t < T; ++t) {
    from[t] = Reader(call, tile + t);
    for (int m = 0; m < rows; ++m) done[t][m] = zero16();
  }
  for (int64_t group = 0, k = 0; group < to.groups; ++group) {
    for (int t = 0; t < T; ++t) {
      from[t].enter(group);
      for (int m = 0; m < rows; ++m) open[t][m] = start_of(call, to, tile + t, group);
    }
    for (int64_t stop = group_end(to, group); k < stop;) {
      int64_t end = k + kAtOnce < stop ? k + kAtOnce : stop, steps = (end - k) / 4;
      for (int t = 0; t < T; ++t) {
        decode(from[t], end - k, decoded[t]);
        __builtin_memset(decoded[t] + 64 * steps, 0, 64 * (-steps & 15));
      }
      for (int m = 0; m < rows; m += 16)
        tile_products<T>(decoded[0], sizeof decoded[0], to.x + (row + m) * to.columns + k, to.columns, steps,
                         &open[0][m], sizeof open[0]);
      k = end;
    }
    for (int t = 0; t < T; ++t) {
      F16 factor = factor_of(call, to, tile + t, group);
      for (int m = 0; m < rows; ++m) done[t][m] = fma(to_floats(open[t][m]), factor, done[t][m]);
    }
  }
  for (int t = 0; t < T; ++t) write(call, to, row, rows, tile + t, done[t]);
}
#endif

template <int T>
INLINE void tiles_times_all(const SparsecCall *call, int64_t tile) {
  int64_t row = 0;
#if TILES
  for (; row + 16 <= call->m && may_use_tiles();) {
    int rows = static_cast<int>(call->m - row < kMost ? (call->m - row) / 16 * 16 : kMost);
    tiles_of_pairs<T>(call, tile, row, rows);
    row += rows;
  }
#endif
  for (; row + kTogether <= call->m; row += kTogether) pairs_times_x<T, kTogether>(call, tile, row);
  if constexpr (kTogether > 4)
    for (; row + 4 <= call->m; row += 4) pairs_times_x<T, 4>(call, tile, row);
  for (; row + 2 <= call->m; row += 2) pairs_times_x<T, 2>(call, tile, row);
  for (; row < call->m; ++row) pairs_times_x<T, 1>(call, tile, row);
}

EXPORT void sparsec_run(const SparsecCall *call, int64_t tile_begin, int64_t tile_end) {
  int64_t tile = tile_begin;
#if TILES
  Tiling tiling;
#endif
  for (; tile + kPair <= tile_end; tile += kPair) tiles_times_all<kPair>(call, tile);
  for (; tile < tile_end; ++tile) tiles_times_all<1>(call, tile);
}
