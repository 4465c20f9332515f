// Codes on AVX2: levels are looked up by two permutations of 8, of which bit 3 of the code chooses.

struct I16 {  // 16 codes, one in each 32-bit lane; above its bits may stand others
  __m256i a, b;
};

INLINE __m256 look8(F16 levels, __m256i i) {
  __m256 low = _mm256_permutevar8x32_ps(levels.a, i), high = _mm256_permutevar8x32_ps(levels.b, i);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}

template <class T>
struct Lut;
template <>
struct Lut<float> {
  F16 t;
  MEMBER Lut() {}
  MEMBER explicit Lut(const float *levels) : t(load16(levels)) {}
  // level i is first + i
  static MEMBER Lut whole(int first) {
    const __m256i count = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    __m256i low = _mm256_add_epi32(count, _mm256_set1_epi32(first));
    Lut lut;
    lut.t = {_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(_mm256_add_epi32(low, _mm256_set1_epi32(8)))};
    return lut;
  }
  static MEMBER Lut ternary() {
    __m256 levels = _mm256_set_ps(0.f, 1.f, 0.f, -1.f, 0.f, 1.f, 0.f, -1.f);
    Lut lut;
    lut.t = {levels, levels};
    return lut;
  }
  MEMBER F16 at(I16 i) const { return {look8(t, i.a), look8(t, i.b)}; }
};

// 8 codes of BITS bits, the lowest bits of `bits` first
template <int BITS>
INLINE __m256i split8(uint32_t bits) {
  const __m256i at = _mm256_set_epi32(7 * BITS, 6 * BITS, 5 * BITS, 4 * BITS, 3 * BITS, 2 * BITS, BITS, 0);
  return _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(bits)), at);
}
INLINE I16 codes16(const Code<8> *v) {
  __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i *>(v));
  return {_mm256_cvtepi8_epi32(all), _mm256_cvtepi8_epi32(_mm_srli_si128(all, 8))};
}
template <int BITS>
INLINE I16 codes16(const Code<BITS> *v) {
  uint64_t bits = 0;
  __builtin_memcpy(&bits, v, BITS == 3 ? 8 : 2 * BITS);  // 6 bytes would be put together in memory, and waited for
  return {split8<BITS>(static_cast<uint32_t>(bits)), split8<BITS>(static_cast<uint32_t>(bits >> (8 * BITS)))};
}
template <int BITS>
INLINE F16 number(I16 codes) {
  if (BITS == 8) return {_mm256_cvtepi32_ps(codes.a), _mm256_cvtepi32_ps(codes.b)};
  __m256i all = _mm256_set1_epi32((1 << BITS) - 1);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(codes.a, all)), _mm256_cvtepi32_ps(_mm256_and_si256(codes.b, all))};
}

// 8 columns: the code at column j is the one that kSpread says; a shift by that many codes brings it down.
template <int BITS>
INLINE __m256 expand8(uint32_t mask, uint32_t bits, const Lut<float> &lut) {
  __m256i p = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(kSpread.at[mask])));
  __m256i twice = _mm256_slli_epi32(p, BITS == 4 ? 2 : 1), shift = BITS == 3 ? _mm256_add_epi32(twice, p) : twice;
  __m256 level = look8(lut.t, _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(bits)), shift));
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(p, 31)), level);
}
// Values at the set bits of `mask`, zeros elsewhere.
template <int BITS>
INLINE F32 expand32(uint32_t mask, const Code<BITS> *v, const Lut<float> &lut) {
  __m256 out[4];
  for (int i = 0, bit = 0; i < 4; ++i, mask >>= 8) {
    uint64_t bits;
    __builtin_memcpy(&bits, v + bit / 8, 8);
    out[i] = expand8<BITS>(mask & 255, static_cast<uint32_t>(bits >> bit % 8), lut);
    bit += BITS * __builtin_popcount(mask & 255);
  }
  return {{out[0], out[1]}, {out[2], out[3]}};
}
INLINE F32 expand32(uint32_t mask, const Code<8> *v, const Lut<float> &) {
  __m256 out[4];
  for (int i = 0; i < 4; ++i, mask >>= 8) {
    __m128i at = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(kSpread.at[mask & 255]));
    __m128i spread = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(v)), at);
    out[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(spread));
    v += __builtin_popcount(mask & 255);
  }
  return {{out[0], out[1]}, {out[2], out[3]}};
}

// 128 codes of a dense row (words.h says where each is), of which word(j) are those of columns 32j to 32j + 31.
template <int BITS, class T>
struct Chunk;
template <int BITS>
struct Chunk<BITS, float> {
  __m256i part[4];
  MEMBER explicit Chunk(const Code<BITS> *v) {
    for (int i = 0; i < 4; ++i) {
      auto p = reinterpret_cast<const __m128i *>(v + i * BITS * 4);
      part[i] = BITS == 4 ? _mm256_cvtepu16_epi32(_mm_loadu_si128(p)) : _mm256_cvtepu8_epi32(_mm_loadl_epi64(p));
    }
  }
  MEMBER F32 word(int j, const Lut<float> &lut) const {
    __m256 out[4];
    for (int i = 0; i < 4; ++i) out[i] = look8(lut.t, _mm256_srli_epi32(part[i], BITS * j));
    return {{out[0], out[1]}, {out[2], out[3]}};
  }
};
template <>
struct Chunk<8, float> {
  const Code<8> *v;
  MEMBER explicit Chunk(const Code<8> *codes) : v(codes) {}
  MEMBER F32 word(int j, const Lut<float> &) const {
    return {number<8>(codes16(v + 32 * j)), number<8>(codes16(v + 32 * j + 16))};
  }
};
template <>
struct Chunk<3, float> {
  const Code<3> *v;
  MEMBER explicit Chunk(const Code<3> *codes) : v(codes) {}
  MEMBER F32 word(int j, const Lut<float> &lut) const { return {lut.at(codes16(v + 12 * j)), lut.at(codes16(v + 12 * j + 6))}; }
};
