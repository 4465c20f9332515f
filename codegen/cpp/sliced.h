// Layout "sliced": the 16 rows of a tile are lanes. In each chunk of 128 columns the rows are sorted by how many
// values they keep, so that step s holds the s-th value (bf16: pair of values) of the first lanes[s] rows, without
// gaps. kShare neighbouring rows use the same columns (blocks of kShare x 1) and share a position.
// pack: values; positions in the chunk (uint8); lanes of each step (uint8); for each tile and chunk 9 bytes, the number
// of steps and the rank of each row (16 x 4 bits); for each tile {first value, first step} (int64), and
// for codes the first position too, because there a byte of values is not a value.

constexpr int kPer = kPerStep;
constexpr int kMostRows = kWide ? 4 : 1;

struct Cursor {
  const Stored *value;
  const uint8_t *position, *lanes, *head;
  int64_t tile;

  MEMBER Cursor() {}
  MEMBER Cursor(const SparsecCall *call, int64_t number) : tile(number) {
    const int64_t *start = pack_of<int64_t>(call, 4) + kStarts * tile;
    value = pack_of<Stored>(call, 0) + start[0];
    position = pack_of<uint8_t>(call, 1) + start[kPositions] / kShare;
    lanes = pack_of<uint8_t>(call, 2) + start[1];
    head = pack_of<uint8_t>(call, 3) + tile * ceil_div(call->k, kChunk) * 9;
  }
  MEMBER int steps() const { return *head; }
  MEMBER uint64_t ranks() const {
    uint64_t r;
    __builtin_memcpy(&r, head + 1, 8);
    return r;
  }
  MEMBER Step<Stored, kShare> next() {
    __builtin_prefetch(reinterpret_cast<const char *>(value) + kAhead);
    __builtin_prefetch(reinterpret_cast<const char *>(position) + kAhead / 2);
    int count = *lanes++;
    const Stored *v = value;
    const uint8_t *p = position;
    value = after(value, count * kPer);
    position += count * kPer / kShare;
    return Step<Stored, kShare>(v, p, count);
  }
  MEMBER void next_chunk() { head += 9; }
};

template <int MB>
INLINE void dot_tile(const SparsecCall *call, int64_t tile, const Lane *x, int64_t stride, F16 *sums) {
  Cursor cursor(call, tile);
  for (int m = 0; m < MB; ++m) sums[m] = zero16();
  for (int64_t k = 0; k < call->k; k += kChunk, cursor.next_chunk()) {
    Table<Lane> table[MB];
    F16 acc[MB];
    for (int m = 0; m < MB; ++m) acc[m] = zero16(), table[m] = Table<Lane>(x + m * stride + k);
    for (int s = cursor.steps(); s > 0; --s) {
      auto step = cursor.next();
      for (int m = 0; m < MB; ++m) acc[m] = step.mac(acc[m], table[m]);
    }
    for (int m = 0; m < MB; ++m) {
      F16 part = kShare == 16 ? acc[m] : unsort(acc[m], cursor.ranks());
      sums[m] = joined_rows(call, tile, part_of(k), sums[m], part);
    }
  }
}
