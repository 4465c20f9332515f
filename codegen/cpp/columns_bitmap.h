// Layout "columns_bitmap": the kept values of a column of W beside each other: tile of kSpan rows of W, column. A column
// of a tile is kSpan / 32 masks and then its values, where codes of each 32 rows start in a new byte. pack: those bytes,
// and where each column begins, in units of 4 bytes (int32).
struct Column {
  const char *at;
  MEMBER Column(const SparsecCall *call, int64_t tile, int64_t column)
      : at(pack_of<char>(call, 0) + 4 * static_cast<int64_t>(pack_of<int32_t>(call, 1)[tile * call->k + column])) {}
  MEMBER void fetch() const {
    for (int64_t b = 0; b < 192; b += 64) __builtin_prefetch(at + b);
  }
  template <class F>
  MEMBER void each(F f) const {
    auto *mask = reinterpret_cast<const uint32_t *>(at);
    auto *v = reinterpret_cast<const Stored *>(at + kSpan / 8);
#pragma GCC unroll 4
    for (int i = 0; i < kSpan / 32; ++i) {
#if CODED
      const Lut<float> lut = middle_lut();
      f(i, numbers(expand32(mask[i], v, lut)));
#else
      f(i, numbers(expand32(mask[i], v)));
#endif
      v = after(v, __builtin_popcount(mask[i]));
    }
  }
};
