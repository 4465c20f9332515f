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
  uint64_t ranks = cursor.ranks();
  for (int r = 0; r < kRows; ++r) {
    list.first[r] = static_cast<int>(ranks >> (4 * r) & 15);
    list.count[r] = count[list.first[r]];
  }
  cursor.next_chunk();
}
