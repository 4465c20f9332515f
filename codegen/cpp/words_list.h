// Layout "words" as lists for the outer loop: every column, in order.

constexpr int kStep = 1;
constexpr int kTogether = 4;  // all lists are as long
constexpr int kGroup = 4;
constexpr int64_t kChunkBytes = kChunk * kBits / 8;

struct Cursor {
  int64_t row;  // the first of the tile
  MEMBER Cursor() {}
  MEMBER Cursor(const SparsecCall *, int64_t tile) : row(tile * kRows) {}
};

INLINE void decode(const SparsecCall *call, Cursor &cursor, int64_t chunk, List &list) {
  int64_t chunks = ceil_div(call->k, kChunk), left = ceil_div(call->k, 32) * 32 - chunk * kChunk;
  int columns = static_cast<int>(left < kChunk ? left : kChunk);
  for (int r = 0; r < kRows; ++r) {
    int64_t group = (cursor.row + r) / kGroup;
    const Stored *v = pack_of<Stored>(call, 0) + ((group * chunks + chunk) * kGroup + r % kGroup) * kChunkBytes;
    Chunk<kBits, float> codes(v);
    int first = list.first[r] = r * kChunk;
    list.row[r] = r, list.count[r] = columns;
#pragma GCC unroll 4
    for (int j = 0; j < kChunk / 32; ++j) {
      Group<float> values(call, cursor.row + r, part_of(chunk * kChunk + 32 * j));
      F32 wide = codes.word(j, values.lut);
      store16(list.value + first + 32 * j, mul(wide.a, splat(values.scale)));
      store16(list.value + first + 32 * j + 16, mul(wide.b, splat(values.scale)));
    }
    for (int i = 0; i < kChunk; ++i) list.column[first + i] = static_cast<uint32_t>(i);
  }
}
