// Layout "bitmap" as lists for the outer loop.

constexpr int kGroup = 4;
constexpr int kStep = 1;
constexpr int kTogether = 1;
constexpr int kSpan = kChunk + 32;  // entries are written 32 at a time

struct Cursor {
  const uint32_t *mask;
  const Stored *value[kRows / kGroup];
  int64_t row;  // the first of the tile
  MEMBER Cursor() {}
  MEMBER Cursor(const SparsecCall *call, int64_t tile) : row(tile * kRows) {
    int64_t group = tile * (kRows / kGroup);
    mask = pack_of<uint32_t>(call, 0) + group * ceil_div(call->k, 32) * kGroup;
    for (int g = 0; g < kRows / kGroup; ++g) value[g] = pack_of<Stored>(call, 1) + pack_of<int64_t>(call, 2)[group + g];
  }
};

INLINE void decode(const SparsecCall *call, Cursor &cursor, int64_t chunk, List &list) {
  const Stored *before[kRows / kGroup];
  __builtin_memcpy(before, cursor.value, sizeof before);
  int64_t words = ceil_div(call->k, 32), end = 4 * chunk + 4 < words ? 4 * chunk + 4 : words;
  for (int r = 0; r < kRows; ++r) list.row[r] = r, list.first[r] = r * kSpan, list.count[r] = 0;
  for (int g = 0; g < kRows / kGroup; ++g) {
    const uint32_t *mask = cursor.mask + (g * words + 4 * chunk) * kGroup;
    for (int64_t w = 4 * chunk; w < end; ++w, mask += kGroup) {
      for (int q = 0; q < kGroup; ++q) {
        int r = g * kGroup + q, n = __builtin_popcount(mask[q]), at = list.first[r] + list.count[r];
        positions32(mask[q], static_cast<uint32_t>(32 * (w - 4 * chunk)), list.column + at);
        Group<float> values(call, cursor.row + r, part_of(32 * w));
        store16(list.value + at, values16(cursor.value[g], values));
        if (n > 16) store16(list.value + at + 16, values16(after(cursor.value[g], 16), values));
        cursor.value[g] = after(cursor.value[g], n);
        list.count[r] += n;
      }
    }
  }
  // The hardware follows none of these many short streams: fetch as much of each as was just used.
  for (int g = 0; g < kRows / kGroup; ++g) {
    __builtin_prefetch(cursor.mask + (g * words + 4 * chunk + 4) * kGroup);
    const char *next = reinterpret_cast<const char *>(cursor.value[g]);
    const char *stop = next + (cursor.value[g] - before[g]) * sizeof(Stored);
    for (; next <= stop; next += 64) __builtin_prefetch(next);
  }
  for (int r = 0; r < kRows; ++r) {
    store16(list.value + list.first[r] + list.count[r], zero16());
    __builtin_memset(list.column + list.first[r] + list.count[r], 0, 16 * sizeof(uint32_t));
  }
}
