// Loop over pairs: of every 4 neighbours of a row 2 are kept (2:4; 1:2 too), so that 16 rows by 8 columns are 64 codes.
// Lanes are rows; the 4 bytes of a lane are two pairs. Zeros are not put back among the weights: the same 8 columns of
// x are shuffled into the places of what each row kept, which takes half the products of the dense weight. x is taken
// with kXOffset added to it, and what that adds to the sums is taken off by the sums of the weights.
// pack: for each 4 steps of 8 columns their codes (as codes4 reads them; of 8 bits: q itself) and 64 bytes of places,
// of which bits 2s and 2s + 1 are those of step s (uint8, one stream); scales [tile][group][16] (float); sums of q
// alike (int32); zeros alike (uint8; kBits < 8); {the type of the weight, bytes from the zeros of one group to the
// next: 0 where all are the same} (int64).
// Expects kBits, kGroup (a multiple of 32), kPair (tiles that share what is loaded of x) and kTogether (rows of x).

#define UNROLL _Pragma("GCC unroll 16")  // see int_steps.h

constexpr int kQuad = 4;
constexpr int64_t kQuadColumns = 8 * kQuad, kQuadCodes = 64 * kQuad * kBits / 8, kQuadBytes = kQuadCodes + 64;
constexpr int kMost = 64;

struct Reader {
  const uint8_t *quad, *zeros;
  int64_t apart;
  Bytes zero;

  MEMBER Reader() {}
  MEMBER Reader(const SparsecCall *call, int64_t tile) {
    quad = pack_of<uint8_t>(call, 0) + tile * (columns_of(call->k) / kQuadColumns) * kQuadBytes;
    apart = pack_of<int64_t>(call, 4)[1];
    zeros = pack_of<uint8_t>(call, 3) + tile * groups_of(call->k) * apart;
  }
  MEMBER void enter(int64_t group) {
    if (kBits < 8) zero = four_times(load_u8(zeros + group * apart));
  }
  // The weights of 4 steps, signed, and the places of all of them.
  MEMBER Bytes next(Bytes *w) {
    for (int64_t i = 0; i < kQuadBytes; i += 64) __builtin_prefetch(reinterpret_cast<const char *>(quad) + kAhead + i);
    if constexpr (kBits == 8) {
      UNROLL for (int i = 0; i < kQuad; ++i) w[i] = load_bytes(quad + 64 * i);
    } else {
      codes4<kBits>(quad, w);
      UNROLL for (int i = 0; i < kQuad; ++i) w[i] = minus(w[i], zero);
    }
    Bytes places = load_bytes(quad + kQuadCodes);
    quad += kQuadBytes;
    return places;
  }
};

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
