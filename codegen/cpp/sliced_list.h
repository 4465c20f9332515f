// Layout "sliced" as lists for the outer loop: steps are spilled as they are, entries of a row are 16 apart.

constexpr int kStep = 16;
constexpr int kTogether = kWide ? 4 : 1;  // neighbours are about as long, and steps are spilled with zeros

INLINE void decode(const SparsecCall *call, Cursor &cursor, int64_t chunk, List &list) {
  typedef int32_t Counts __attribute__((vector_size(64)));
  const Counts rank = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Counts count = {};
  int steps = cursor.steps();
  for (int s = 0; s < steps; ++s) {
    count -= (rank < static_cast<int32_t>(*cursor.lanes)) * kPer;  // true is -1; a branch here is never predicted
    cursor.next().spill(list.value + s * kPer * 16, list.column + s * kPer * 16);
  }
  for (int i = 0; i < kUnroll; ++i) {
    store16(list.value + (steps * kPer + i) * 16, zero16());
    __builtin_memset(list.column + (steps * kPer + i) * 16, 0, 16 * sizeof(uint32_t));
  }
  scale_sorted(call, cursor.tile, part_of(chunk * kChunk), cursor.ranks(), list.value, steps * kPer);
  __builtin_memcpy(list.count, &count, sizeof count);
  uint64_t ranks = cursor.ranks();
  for (int l = 0; l < kRows; ++l) list.first[l] = l, list.row[ranks >> (4 * l) & 15] = l;
  cursor.next_chunk();
}
