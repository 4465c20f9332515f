// Layout "sliced" as lists for the outer loop: steps are spilled as they are, entries of a row are 16 apart.

constexpr int kStep = 16;

INLINE void decode(const SparsecCall *, Cursor &cursor, int64_t, List &list) {
  int count[kRows], steps = cursor.steps(), above = kRows;
  for (int s = 0; s < steps; ++s) {
    int lanes = *cursor.lanes;
    for (; above > lanes; --above) count[above - 1] = s * kPer;
    cursor.next().spill(list.value + s * kPer * 16, list.column + s * kPer * 16);
  }
  for (; above > 0; --above) count[above - 1] = steps * kPer;
  for (int i = 0; i < kUnroll; ++i) {
    store16(list.value + (steps * kPer + i) * 16, zero16());
    __builtin_memset(list.column + (steps * kPer + i) * 16, 0, 16 * sizeof(uint32_t));
  }
  uint64_t ranks = cursor.ranks();
  for (int l = 0; l < kRows; ++l) list.first[l] = l, list.count[l] = count[l], list.row[ranks >> (4 * l) & 15] = l;
  cursor.next_chunk();
}
