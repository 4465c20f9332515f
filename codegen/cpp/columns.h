// Layout "columns": every position, zeros too, column by column: tile of kSpan rows of W, column, row of the tile. Codes
// are in the order of words.h. pack: values.
constexpr int64_t kColumnBytes = kSpan * kValueBits / 8;

struct Column {
  const char *at;
  MEMBER Column(const SparsecCall *call, int64_t tile, int64_t column)
      : at(pack_of<char>(call, 0) + (tile * call->k + column) * kColumnBytes) {}
  MEMBER void fetch() const {
    for (int64_t b = 0; b < kColumnBytes; b += 64) __builtin_prefetch(at + b);
  }
  // f(i, values of rows 32 i to 32 i + 31 of the tile) for each i
  template <class F>
  MEMBER void each(F f) const {
    auto *v = reinterpret_cast<const Stored *>(at);
#if CODED
    Chunk<kBits, float> codes(v);
    const Lut<float> lut = middle_lut();
#pragma GCC unroll 4
    for (int i = 0; i < kSpan / 32; ++i) f(i, codes.word(i, lut));
#else
#pragma GCC unroll 4
    for (int i = 0; i < kSpan / 32; ++i) f(i, F32{load16(v + 32 * i), load16(v + 32 * i + 16)});
#endif
  }
};
