// What a layout hands to the loop "outer", whatever its positions look like: kStep,
//   struct Cursor { Cursor(const SparsecCall *, int64_t tile); };         // where a tile is being read
//   void decode(const SparsecCall *, Cursor &, int64_t chunk, List &);    // chunks in order; moves the cursor on

// The kept weights of a tile in one chunk: entry i of row r is at [first[r] + i * kStep].
struct List {
  alignas(64) float value[kRows * (kChunk + 32)];
  alignas(64) uint32_t column[kRows * (kChunk + 32)];  // in the chunk
  int first[kRows], count[kRows];
};
