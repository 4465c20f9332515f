// Layout "columns_bitmap": the kept values of a column of W beside each other: tile of up to kBlockChunks chunks of rows,
// column. A column of a tile is its masks and then its values, where codes of each 32 rows start in a new byte. pack:
// those bytes, and where each column of each tile begins, in units of 4 bytes (int32).
constexpr int kMostRows = kWide ? 4 : 1;                                    // rows of x for which columns are read once
constexpr int64_t kBlockChunks = 16;                                        // of rows: a tile
constexpr int64_t kStep = kChunk / 2, kStepSize = kStep * kValueBits / 16;  // of values, where half is kept
constexpr int64_t kFront = kBlockChunks * kChunk / 8;                       // of masks before them
INLINE int64_t tile_chunks(const SparsecCall *call) {
  int64_t all = ceil_div(call->n, kChunk);
  return all < kBlockChunks ? all : kBlockChunks;
}

struct Column {
  const uint32_t *mask;
  const Stored *v;
  MEMBER Column() {}
  MEMBER Column(const SparsecCall *call, int64_t chunk, int64_t column) {
    int64_t chunks = tile_chunks(call), start = pack_of<int32_t>(call, 1)[chunk / chunks * call->k + column];
    auto *at = pack_of<char>(call, 0) + 4 * start;
    mask = reinterpret_cast<const uint32_t *>(at);
    v = reinterpret_cast<const Stored *>(at + chunks * kChunk / 8);
  }
  MEMBER const char *here() const { return reinterpret_cast<const char *>(v); }
  template <class F>
  MEMBER void next(F f) {
#pragma GCC unroll 4
    for (int i = 0; i < kStep / 32; ++i) {
#if CODED
      const Lut<float> lut = middle_lut();
      f(i, numbers(expand32(mask[i], v, lut)));
#else
      f(i, numbers(expand32(mask[i], v)));
#endif
      v = after(v, __builtin_popcount(mask[i]));
    }
    mask += kStep / 32;
  }
};
