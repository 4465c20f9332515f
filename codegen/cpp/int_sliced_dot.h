// Loop over slices: x is looked up by the positions of a step, with kXOffset added to it, and what that adds to the sums
// is taken off by the sums of the weights.

constexpr bool kBroadcast = kShare == 16 && kRun == 4;  // all lanes take the same four columns
constexpr int kMost = kBroadcast ? 16 : 8;              // rows of x whose tables and sums fit the registers
static_assert(!kBroadcast || kSide == kMost, "prepare puts the rows of a block side by side");

template <int MB>
__attribute__((noinline)) void slices_times_x(const SparsecCall *call, const Activations &to, int64_t tile,
                                              int64_t row) {
  Cursor at(call, tile);
  int64_t of_scale = kGroup ? to.groups : 1, group = -1;
  const float *scale = pack_of<float>(call, 5) + tile * kRows * of_scale;
  const int32_t *q_sum = pack_of<int32_t>(call, 6) + tile * kRows * to.groups;
  const int8_t *x = to.x + row * to.columns;
  F16 done[MB];
  I16 whole[MB];
  UNROLL for (int m = 0; m < MB; ++m) done[m] = zero16();
  for (int64_t k = 0; k < call->k; k += kSlice, at.next_chunk()) {
    if (k % kGroupColumns == 0) {
      ++group;
      I16 start = mul_i(load_i16(q_sum + group * kRows), splat_i(-kXOffset));
      UNROLL for (int m = 0; m < MB; ++m) whole[m] = start;
    }
    XTable<kShare, kRun> table[MB];
    I16 acc[MB];
    UNROLL for (int m = 0; m < MB; ++m) {
      acc[m] = zero_i16();
      table[m].load(kBroadcast ? x + k * MB + 4 * m : x + m * to.columns + k);
    }
    Bytes zero = kBits == 8 ? splat_bytes(kByteZero) : four_times(load_u8(at.zero));
    for (int s = at.head[0]; s > 0; --s) {
      int lanes = *at.lanes++;
      __builtin_prefetch(reinterpret_cast<const char *>(at.code) + kAhead / 2);
      __builtin_prefetch(reinterpret_cast<const char *>(at.position) + kAhead / 2);
      Bytes w = centred(codes64<kBits>(at.code), zero, lanes);
      XPlaces<kShare, kRun> places(at.position);
      at.code += lanes * kBits / 2;
      at.position += lanes / kShare * (4 / kRun);
      UNROLL for (int m = 0; m < MB; ++m) acc[m] = dot_signed(acc[m], table[m].at(places, MB), w);
    }
    uint64_t ranks = at.ranks();
    UNROLL for (int m = 0; m < MB; ++m) whole[m] = add_i(whole[m], kShare == 16 ? acc[m] : unsort_i(acc[m], ranks));
    if ((k + kSlice) % kGroupColumns && k + kSlice < call->k) continue;
    F16 factor = load16(scale + (kGroup ? group * kRows : 0));
    UNROLL for (int m = 0; m < MB; ++m) done[m] = fma(to_floats(whole[m]), factor, done[m]);
  }
  UNROLL for (int m = 0; m < MB; ++m) done[m] = mul(done[m], splat(to.scale[row + m]));
  finish<X>(call, row, MB, tile * kRows, done);
}

#if TILES
// The same on tiles of 16 rows of x by 16 rows of W, where lanes take the same columns: of W only what keeps something
// in 64 columns becomes a tile, whatever is empty is neither written nor multiplied.
constexpr int kTilesAtOnce = 16;  // that are decoded into the first-level cache while the rows of x pass by
constexpr int kMostTiled = 64;
static_assert(kBroadcast && kSlice % 64 == 0, "a tile lies in one chunk");

struct Filled {
  alignas(64) uint8_t tile[kTilesAtOnce][1024];
  int64_t column[kTilesAtOnce];
  int count = 0;
  MEMBER uint8_t *next(int64_t at) {
    column[count] = at;
    __builtin_memset(tile[count], 0, sizeof tile[count]);
    return tile[count++];
  }
};

// open[m] lane n += products of `rows` rows of x with the tiles that are filled, which are then empty.
INLINE void multiply(const Activations &to, int64_t row, int rows, Filled &filled, I16 *open) {
  const int8_t *x = to.flat + row * to.columns;
  for (int m = 0; m < rows; m += 32, x += 32 * to.columns) {
    if (m + 32 <= rows) chosen_products<2>(filled.tile[0], filled.column, filled.count, x, to.columns, open + m);
    else chosen_products<1>(filled.tile[0], filled.column, filled.count, x, to.columns, open + m);
  }
  filled.count = 0;
}

__attribute__((noinline)) static void slices_on_tiles(const SparsecCall *call, const Activations &to, int64_t tile,
                                                      int64_t row, int rows) {
  Cursor at(call, tile);
  Filled filled;
  F16 done[kMostTiled];
  I16 open[kMostTiled];
  int64_t of_scale = kGroup ? to.groups : 1, group = -1;
  for (int m = 0; m < rows; ++m) done[m] = zero16();
  for (int64_t k = 0; k < call->k; k += kSlice, at.next_chunk()) {
    if (k % kGroupColumns == 0) {
      ++group;
      I16 sums = load_i16(pack_of<int32_t>(call, 6) + (tile * to.groups + group) * kRows);
      for (int m = 0; m < rows; ++m) open[m] = mul_i(sums, splat_i(-kXOffset));
    }
    Bytes zero = kBits == 8 ? splat_bytes(kByteZero) : four_times(load_u8(at.zero));
    uint8_t *bytes = nullptr;
    for (int s = 0, steps = at.head[0], last = -1; s < steps; ++s, at.code += 8 * kBits) {
      int place = *at.position++;
      if (place / 16 != last) {
        if (filled.count == kTilesAtOnce) multiply(to, row, rows, filled, open);
        last = place / 16, bytes = filled.next(k + 64 * last);
      }
      store_bytes(bytes + 64 * (place % 16), minus(codes64<kBits>(at.code), zero));
    }
    if ((k + kSlice) % kGroupColumns && k + kSlice < call->k) continue;
    multiply(to, row, rows, filled, open);
    F16 factor = load16(pack_of<float>(call, 5) + (tile * of_scale + (kGroup ? group : 0)) * kRows);
    for (int m = 0; m < rows; ++m) done[m] = fma(to_floats(open[m]), factor, done[m]);
  }
  for (int m = 0; m < rows; ++m) done[m] = mul(done[m], splat(to.scale[row + m]));
  finish<X>(call, row, rows, tile * kRows, done);
}
#endif

EXPORT void sparsec_run(const SparsecCall *call, int64_t tile_begin, int64_t tile_end) {
  Activations to(call);
#if TILES
  Tiling tiling;
#endif
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    int64_t row = 0;
#if TILES
    for (int rows; row + 16 <= call->m && may_use_tiles(); row += rows) {
      rows = static_cast<int>(call->m - row < kMostTiled ? (call->m - row) / 16 * 16 : kMostTiled);
      slices_on_tiles(call, to, tile, row, rows);
    }
#endif
    for (; row + kMost <= call->m; row += kMost) slices_times_x<kMost>(call, to, tile, row);
    if constexpr (kMost > 8)
      for (; row + 8 <= call->m; row += 8) slices_times_x<8>(call, to, tile, row);
    for (; row + 4 <= call->m; row += 4) slices_times_x<4>(call, to, tile, row);
    for (; row + 2 <= call->m; row += 2) slices_times_x<2>(call, to, tile, row);
    for (; row < call->m; ++row) slices_times_x<1>(call, to, tile, row);
  }
}
