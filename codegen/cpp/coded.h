// Weights that are stored as codes: Stored is a byte of kBits-bit codes, and a group of columns of a row has a scale, or
// a row a book of up to 16 levels (a table of 16, that repeats). The words of plain.h, written on what coded_<isa>.h makes of codes. Sums over a group are
// of whole numbers times x, and scaled once; single values are scaled each. Behind the tensors of the layout (kTail of
// them) a pack has: scales fp32 [tile][group][16 rows], or levels fp32 [row][16]; zero points uint8, in the order of
// the scales (4 bits only); and the outliers of outliers.h. Rows have groups up to a multiple of kChunk columns.

INLINE int64_t part_of(int64_t column) { return kGroupColumns ? column / kGroupColumns : 0; }
INLINE int64_t parts_of(int64_t k) {
  return kGroupColumns ? ceil_div(k, kChunk) * (kChunk / (kGroupColumns ? kGroupColumns : 1)) : 1;
}
INLINE int64_t scale_at(const SparsecCall *call, int64_t row, int64_t part) {
  return (row / kRows * parts_of(call->k) + part) * kRows + row % kRows;
}

// Codes of 2 and 4 bits are looked up: level i is i - zero, or from the book.
template <class T>
struct Group {
  Lut<T> lut;
  float scale;
  MEMBER Group() {}
  MEMBER Group(const SparsecCall *call, int64_t row, int64_t part) : scale(1.f) {
    if (kBook) {
      lut = Lut<T>(pack_of<float>(call, kTail) + 16 * row);
      return;
    }
    int64_t at = scale_at(call, row, part);
    scale = pack_of<float>(call, kTail)[at];
    if (kBits == 4) lut = Lut<T>::whole(-pack_of<uint8_t>(call, kTail + 1)[at]);
    if (kBits == 2) lut = Lut<T>::ternary();
  }
  MEMBER F16 joined(F16 sum, F16 part) const { return kBook ? add(sum, part) : fma(part, splat(scale), sum); }
};

template <int BITS, class T>
INLINE auto expand32(uint32_t mask, const Code<BITS> *v, const Group<T> &group) {
  return expand32(mask, v, group.lut);
}
// 16 values that follow each other, as they are in the weight.
INLINE F16 values16(const Stored *v, const Group<float> &group) {
  F16 levels = kBits == 8 ? number<8>(codes16(v)) : group.lut.at(codes16(v));
  return kBook ? levels : mul(levels, splat(group.scale));
}
// Where the next values are after `n` of them that are read together.
INLINE const Stored *after(const Stored *v, int64_t n) { return v + (n * kBits + 7) / 8; }

// ---- layouts whose lanes are rows ("sliced", "columns"): scales are joined to sums, and zero is the middle of the range

INLINE Lut<float> middle_lut() {
  return kBits == 2 ? Lut<float>::ternary() : kBits == 4 ? Lut<float>::whole(-8) : Lut<float>();
}

constexpr int kPerStep = 1;
constexpr int kStarts = 3, kPositions = 2;
constexpr float kMiddle = kBits == 4 ? 8.f : kBits == 2 ? 1.f : 0.f;

template <int BITS>
struct Unpacked {
  alignas(64) float numbers[16];
  MEMBER explicit Unpacked(const Code<BITS> *v) { store16(numbers, sub(number<BITS>(codes16(v)), splat(kMiddle))); }
};
template <int BITS, int R>
struct Step<Code<BITS>, R> : Unpacked<BITS>, Step<float, R> {
  MEMBER Step(const Code<BITS> *v, const uint8_t *p, int lanes) : Unpacked<BITS>(v), Step<float, R>(this->numbers, p, lanes) {}
};

INLINE F16 joined_rows(const SparsecCall *call, int64_t tile, int64_t part, F16 sum, F16 part_sum) {
  return fma(part_sum, load16(pack_of<float>(call, kTail) + scale_at(call, tile * kRows, part)), sum);
}
INLINE void scale_sorted(const SparsecCall *call, int64_t tile, int64_t part, uint64_t ranks, float *value, int64_t steps) {
  const float *scale = pack_of<float>(call, kTail) + scale_at(call, tile * kRows, part);
  alignas(64) float sorted[kRows];
  for (int r = 0; r < kRows; ++r) sorted[ranks >> (4 * r) & 15] = scale[r];
  F16 scales = load16(sorted);
  for (int64_t s = 0; s < steps; ++s) store16(value + 16 * s, mul(load16(value + 16 * s), scales));
}
