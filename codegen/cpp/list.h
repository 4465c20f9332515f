// What a layout hands to the loop "outer", whatever its positions look like: kStep, kTogether (lists that are worked on
// at once: the first of them is the longest, and zero values fill the others up to its length),
//   struct Cursor { Cursor(const SparsecCall *, int64_t tile); };         // where a tile is being read
//   void decode(const SparsecCall *, Cursor &, int64_t chunk, List &);    // chunks in order; moves the cursor on

// The kept weights of a tile in one chunk: entry i of list l, which is row row[l], is at [first[l] + i * kStep]. Up to
// kUnroll - 1 zero values follow the last entry, so that the loop has no remainder; longer lists come first where the
// layout knows them, because then the branch at the end of a list is predicted.
constexpr int kUnroll = 4;

struct List {
  alignas(64) float value[kRows * (kChunk + 32)];
  alignas(64) uint32_t column[kRows * (kChunk + 32)];  // in the chunk
  int row[kRows], first[kRows], count[kRows];
};
