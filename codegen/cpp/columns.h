// Layout "columns": the weight transposed, [K][N rounded up to kChunk]; codes of kChunk rows are in the order of words.h.
// pack: values. Work is split into tiles of one chunk of rows.
INLINE int64_t tile_chunks(const SparsecCall *) { return 1; }
constexpr int kMostRows = kWide ? 2 : 1;  // rows of x for which columns are read once
constexpr int64_t kBlockChunks = 128;     // of rows: what may be worked on together
constexpr int64_t kStep = CODED && (kValueBits == 4 || kValueBits == 2) ? kChunk : kChunk / 2;  // rows read at once
constexpr int64_t kStepSize = kStep * kValueBits / 8, kFront = 0, kChunkSize = kChunk * kValueBits / 8;

struct Column {
  const char *at;
  MEMBER Column() {}
  MEMBER Column(const SparsecCall *call, int64_t chunk, int64_t column)
      : at(pack_of<char>(call, 0) + (column * ceil_div(call->n, kChunk) + chunk) * kChunkSize) {}
  MEMBER const char *here() const { return at; }
  // f(i, values of rows 32 i to 32 i + 31) of the next kStep rows
  template <class F>
  MEMBER void next(F f) {
    auto *v = reinterpret_cast<const Stored *>(at);
    at += kStepSize;
#if CODED
    Chunk<kBits, float> codes(v);
    const Lut<float> lut = middle_lut();
#pragma GCC unroll 4
    for (int i = 0; i < kStep / 32; ++i) f(i, codes.word(i, lut));
#else
#pragma GCC unroll 4
    for (int i = 0; i < kStep / 32; ++i) f(i, F32{load16(v + 32 * i), load16(v + 32 * i + 16)});
#endif
  }
};
