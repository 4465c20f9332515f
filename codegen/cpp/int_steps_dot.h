// Loop over steps: 64 decoded bytes of W times the same 4 columns of some rows of x. Codes are unsigned, so that
//   the sum over k of (code - zero) x = the sum of code x - zero * the sum of x,
// whose last factor prepare has worked out for each row of x.
// Ternary weights by table lookups instead (vpshufb of the sums of 4 columns of x; T-MAC, Wei et al., 2024) took, with
// exact tables of 16 bits, one row of x and AVX-512, 1.65x this loop's time in the cache and 0.9x from memory before the
// tables are made; tables of 8 bits (0.97x and 0.7x) round the sums.
// Expects kPair (tiles that share what is loaded of x) and kTogether (rows of x whose sums fit the registers then).

constexpr int64_t kAtOnce = 128;  // steps that are decoded into the first-level cache while kMost rows of x pass by
constexpr int kMost = 64;

// Reads what a Reader has decoded.
struct Decoded {
  const uint8_t *at;
  MEMBER void enter(int64_t) {}
  MEMBER void next(Bytes *out) {
    UNROLL for (int i = 0; i < kQuad; ++i, at += 64) out[i] = load_bytes(at);
  }
};

// Of one tile and up to kMost rows of x: sums that are finished, and those of the group that is being read.
struct Results {
  F16 done[kMost];
  I16 open[kMost];
};

template <int T, class R>
struct Tiles {
  R of[T];
};

// Steps [begin, end) of T tiles times MB of `wide` rows of x, the first of which is row `first` of the results.
template <int T, int MB, class R>
__attribute__((noinline)) void steps_times_x(const SparsecCall *call, Tiles<T, R> from, int64_t tile, const int8_t *x,
                                             int64_t wide, const int32_t *sums, int64_t begin, int64_t end,
                                             Results *results, int64_t first) {
  constexpr int kSums = T * MB >= 4 ? 1 : 4 / (T * MB);  // enough sums in flight that none waits for itself
  int64_t groups = groups_of(call->k), last = columns_of(call->k) / 4;
  x += begin * 4 * wide;
  for (int64_t s = begin; s < end;) {
    int64_t group = s / kStepsOfGroup, stop = (group + 1) * kStepsOfGroup;
    if (stop > last) stop = last;
    int64_t pause = stop < end ? stop : end;
    bool opened = s % kStepsOfGroup;
    I16 acc[kSums][T][MB];
    UNROLL for (int u = 0; u < kSums; ++u)
      UNROLL for (int t = 0; t < T; ++t)
        UNROLL for (int m = 0; m < MB; ++m)
          acc[u][t][m] = opened && !u ? results[t].open[first + m] : zero_i16();
    UNROLL for (int t = 0; t < T; ++t) from.of[t].enter(group);
    for (; s < pause; s += kQuad) {
      Bytes w[T][kQuad];
      UNROLL for (int t = 0; t < T; ++t) from.of[t].next(w[t]);
      UNROLL for (int i = 0; i < kQuad; ++i) {
        UNROLL for (int m = 0; m < MB; ++m) {
          Bytes four = four_columns(x + 4 * m);
          UNROLL for (int t = 0; t < T; ++t) acc[i % kSums][t][m] = dot<kBits>(acc[i % kSums][t][m], w[t][i], four);
        }
        x += 4 * wide;
      }
    }
    UNROLL for (int u = 1; u < kSums; ++u)
      UNROLL for (int t = 0; t < T; ++t)
        UNROLL for (int m = 0; m < MB; ++m) acc[0][t][m] = add_i(acc[0][t][m], acc[u][t][m]);
    UNROLL for (int t = 0; t < T; ++t) {
      Results &to = results[t];
      if (s < stop) {
        UNROLL for (int m = 0; m < MB; ++m) to.open[first + m] = acc[0][t][m];
        continue;
      }
      I16 zero = Zeros(call, tile + t).of(group);
      F16 factor = load16(pack_of<float>(call, 3) + (kGroup ? (tile + t) * groups + group : tile + t) * kRows);
      UNROLL for (int m = 0; m < MB; ++m) {
        I16 sum = acc[0][t][m];
        if (kByteZero || kBits < 8) sum = sub_i(sum, mul_i(zero, splat_i(sums[m * groups + group])));
        to.done[first + m] = fma(to_floats(sum), factor, to.done[first + m]);
      }
    }
  }
}

// All `wide` rows of a block, which prepare has put side by side.
template <int T, class R>
INLINE void block_times_x(const SparsecCall *call, const Tiles<T, R> &from, int64_t tile, const Activations &to,
                          int64_t row, int64_t wide, int64_t begin, int64_t end, Results *results, int64_t first) {
  const int8_t *x = to.x + row * to.columns;
  const int32_t *sums = to.sum + row * to.groups;
  if (wide == 1) return steps_times_x<T, 1>(call, from, tile, x, wide, sums, begin, end, results, first);
  if (wide == 2) return steps_times_x<T, 2>(call, from, tile, x, wide, sums, begin, end, results, first);
  if (kTogether > 4 && wide == 4)
    return steps_times_x<T, 4>(call, from, tile, x, wide, sums, begin, end, results, first);
  for (int64_t i = 0; i < wide; i += kTogether)
    steps_times_x<T, kTogether>(call, from, tile, x + 4 * i, wide, sums + i * to.groups, begin, end, results,
                                first + i);
}

INLINE void decode(Reader &from, int64_t begin, int64_t end, uint8_t *out) {
  for (int64_t s = begin; s < end; s += kQuad, out += 64 * kQuad) {
    if (s == begin || s % kStepsOfGroup == 0) from.enter(s / kStepsOfGroup);
    Bytes w[kQuad];
    from.next(w);
    UNROLL for (int i = 0; i < kQuad; ++i) store_bytes(out + 64 * i, w[i]);
  }
}

#if TILES
// The same on tiles of 16 rows of x by 16 rows of W: steps [begin, end), whose bytes are zero up to a multiple of 16.
template <int T>
__attribute__((noinline)) void tiles_of_x(const SparsecCall *call, const Tiles<T, Decoded> &from, int64_t tile,
                                          const Activations &to, int64_t row, int64_t begin, int64_t end,
                                          Results *results, int64_t first) {
  int64_t groups = groups_of(call->k), last = columns_of(call->k) / 4;
  for (int64_t s = begin; s < end;) {
    int64_t group = s / kStepsOfGroup, stop = (group + 1) * kStepsOfGroup;
    if (stop > last) stop = last;
    int64_t pause = stop < end ? stop : end;
    for (int t = 0; t < T; ++t)
      for (int m = 0; m < 16 && s % kStepsOfGroup == 0; ++m) results[t].open[first + m] = zero_i16();
    const int8_t *x = to.flat + row * to.columns + 4 * s;
    tile_products<T>(from.of[0].at + 64 * (s - begin), from.of[T - 1].at - from.of[0].at, x, to.columns, pause - s,
                     &results[0].open[first], sizeof(Results));
    s = pause;
    if (s < stop) continue;
    for (int t = 0; t < T; ++t) {
      I16 zero = Zeros(call, tile + t).of(group);
      F16 factor = load16(pack_of<float>(call, 3) + (kGroup ? (tile + t) * groups + group : tile + t) * kRows);
      for (int m = 0; m < 16; ++m) {
        I16 sum = sub_i(results[t].open[first + m], mul_i(zero, splat_i(to.sum[(row + m) * groups + group])));
        results[t].done[first + m] = fma(to_floats(sum), factor, results[t].done[first + m]);
      }
    }
  }
}
#endif

template <int T>
INLINE void tiles_times_x(const SparsecCall *call, int64_t tile, const Activations &to, int64_t row, int64_t rows) {
  Results results[T];
  Tiles<T, Reader> from;
  int64_t steps = to.columns / 4;
  for (int t = 0; t < T; ++t) {
    from.of[t] = Reader(call, tile + t);
    for (int64_t i = 0; i < rows; ++i) results[t].done[i] = zero16();
  }
  if (rows <= kTogether && block_rows(rows) == rows) {
    block_times_x(call, from, tile, to, row, rows, 0, steps, results, 0);
  } else {
    alignas(64) uint8_t decoded[T][64 * kAtOnce];
    Tiles<T, Decoded> again;
    for (int64_t s = 0, end; s < steps; s = end) {
      end = s + kAtOnce < steps ? s + kAtOnce : steps;
      for (int t = 0; t < T; ++t) {
        again.of[t].at = from.of[t].code;
        if (kAsStored && !(TILES && (end - s) % 16)) {
          from.of[t].code += 64 * (end - s);
          continue;
        }
        decode(from.of[t], s, end, decoded[t]);
        if (TILES) __builtin_memset(decoded[t] + 64 * (end - s), 0, 64 * ((s - end) & 15));
        again.of[t].at = decoded[t];
      }
      for (int64_t i = 0, wide; i < rows; i += wide) {
        wide = block_rows(rows - i);
#if TILES
        if (wide == 16 && kStepsOfGroup % 16 == 0 && may_use_tiles()) {
          tiles_of_x(call, again, tile, to, row + i, s, end, results, i);
          continue;
        }
#endif
        block_times_x(call, again, tile, to, row + i, wide, s, end, results, i);
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int64_t i = 0; i < rows; ++i) results[t].done[i] = mul(results[t].done[i], splat(to.scale[row + i]));
    finish<X>(call, row, static_cast<int>(rows), (tile + t) * kRows, results[t].done);
  }
}

template <int T>
INLINE void tiles_times_all(const SparsecCall *call, const Activations &to, int64_t tile) {
  for (int64_t row = 0; row < call->m; row += kMost)
    tiles_times_x<T>(call, tile, to, row, call->m - row < kMost ? call->m - row : kMost);
}

EXPORT void sparsec_run(const SparsecCall *call, int64_t tile_begin, int64_t tile_end) {
  Activations to(call);
  int64_t tile = tile_begin;
#if TILES
  Tiling tiling;
#endif
  for (; tile + kPair <= tile_end; tile += kPair) tiles_times_all<kPair>(call, to, tile);
  for (; tile < tile_end; ++tile) tiles_times_all<1>(call, to, tile);
}
