// Layout "rows" as lists for the outer loop.

constexpr int kStep = 1;
constexpr int kTogether = 1;

struct Cursor {
  int64_t row, next[kRows], end[kRows];
  MEMBER Cursor() {}
  MEMBER Cursor(const SparsecCall *call, int64_t tile) : row(tile * kRows) {
    const int64_t *start = pack_of<int64_t>(call, 2) + tile * kRows;
    for (int r = 0; r < kRows; ++r) next[r] = start[r], end[r] = start[r + 1];
  }
};

INLINE void decode(const SparsecCall *call, Cursor &cursor, int64_t chunk, List &list) {
  const int32_t *block = pack_of<int32_t>(call, 1);
  for (int r = 0; r < kRows; ++r) {
    int at = list.first[r] = r * kChunk;
    list.row[r] = r;
    int64_t b = cursor.next[r];
    for (; b < cursor.end[r] && block[b] < 8 * (chunk + 1); ++b) {
      Group<float> values(call, cursor.row + r, part_of(16 * static_cast<int64_t>(block[b])));
      store16(list.value + at, values16(after(pack_of<Stored>(call, 0), 16 * b), values));
      uint32_t column = 16 * static_cast<uint32_t>(block[b] - 8 * chunk);
      for (int i = 0; i < 16; ++i) list.column[at++] = column + i;
    }
    list.count[r] = at - list.first[r];
    cursor.next[r] = b;
  }
}
