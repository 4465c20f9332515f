// Codes on AVX-512: levels are looked up by one permutation, whose indices need no mask where levels repeat.

typedef __m512i I16;  // 16 codes, one in each 32-bit lane; above its bits may stand others

// Small whole numbers as bf16: kWhole[15 + i] is i, for -15 <= i <= 15.
alignas(64) static const uint16_t kWhole[32] = {
    0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0,
    0xc080, 0xc040, 0xc000, 0xbf80, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0,
    0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0};

template <class T>
struct Lut;
template <>
struct Lut<float> {
  F16 t;
  MEMBER Lut() {}
  MEMBER explicit Lut(const float *levels) : t(load16(levels)) {}
  // level i is first + i
  static MEMBER Lut whole(int first) {
    Lut lut;
    lut.t = widen(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(kWhole + 15 + first)));
    return lut;
  }
  static MEMBER Lut ternary() {
    Lut lut;
    lut.t = _mm512_broadcast_f32x4(_mm_set_ps(0.f, 1.f, 0.f, -1.f));
    return lut;
  }
  MEMBER F16 at(I16 i) const { return _mm512_permutexvar_ps(i, t); }
};
template <>
struct Lut<bf16> {  // the 16 levels twice
  B32 t;
  MEMBER Lut() {}
  MEMBER explicit Lut(const float *levels) {
    __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(load16(levels)), 16);  // a bf16 weight has levels of bf16
    t = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(bits));
  }
  static MEMBER Lut whole(int first) {
    Lut lut;
    lut.t = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(kWhole + 15 + first)));
    return lut;
  }
  static MEMBER Lut ternary() {
    Lut lut;
    lut.t = _mm512_set1_epi64(0x00003f800000bf80);
    return lut;
  }
};

INLINE I16 codes16(const Code<8> *v) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(v)));
}
INLINE I16 codes16(const Code<4> *v) {
  const __m512i at = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
  uint32_t low, high;
  __builtin_memcpy(&low, v, 4), __builtin_memcpy(&high, v + 4, 4);
  __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(static_cast<int>(low)), 0xff00, static_cast<int>(high));
  return _mm512_srlv_epi32(both, at);
}
INLINE I16 codes16(const Code<2> *v) {
  const __m512i at = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  uint32_t all;
  __builtin_memcpy(&all, v, 4);
  return _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(all)), at);
}
// A window of bytes in each lane, in which its code of 3 bits is shifted down.
INLINE I16 codes16(const Code<3> *v) {
  const __m512i bytes = _mm512_set_epi32(0x0605, 0x0605, 0x0504, 0x0504, 0x0504, 0x0403, 0x0403, 0x0403, 0x0302, 0x0302,
                                         0x0201, 0x0201, 0x0201, 0x0100, 0x0100, 0x0100);
  const __m512i at = _mm512_set_epi32(5, 2, 7, 4, 1, 6, 3, 0, 5, 2, 7, 4, 1, 6, 3, 0);
  uint64_t all;
  __builtin_memcpy(&all, v, 8);
  return _mm512_srlv_epi32(_mm512_shuffle_epi8(_mm512_set1_epi64(static_cast<int64_t>(all)), bytes), at);
}
template <int BITS>
INLINE F16 number(I16 codes) {
  return _mm512_cvtepi32_ps(BITS == 8 ? codes : _mm512_and_si512(codes, _mm512_set1_epi32((1 << BITS) - 1)));
}

// 32 codes that follow each other, in 16-bit lanes
INLINE B32 codes32(const Code<4> *v) {
  __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(v)));
  const __m512i word = _mm512_set_epi64(0x0f0e0f0e0f0e0f0e, 0x0d0c0d0c0d0c0d0c, 0x0b0a0b0a0b0a0b0a, 0x0908090809080908,
                                        0x0706070607060706, 0x0504050405040504, 0x0302030203020302, 0x0100010001000100);
  return _mm512_srlv_epi16(_mm512_shuffle_epi8(all, word), _mm512_set1_epi64(0x000c000800040000));
}
INLINE B32 codes32(const Code<2> *v) {
  uint64_t bits;
  __builtin_memcpy(&bits, v, 8);
  __m512i all = _mm512_set1_epi64(static_cast<int64_t>(bits));
  const __m512i word = _mm512_set_epi64(0x0706070607060706, 0x0706070607060706, 0x0504050405040504, 0x0504050405040504,
                                        0x0302030203020302, 0x0302030203020302, 0x0100010001000100, 0x0100010001000100);
  const __m512i at = _mm512_set_epi64(0x000e000c000a0008, 0x0006000400020000, 0x000e000c000a0008, 0x0006000400020000,
                                      0x000e000c000a0008, 0x0006000400020000, 0x000e000c000a0008, 0x0006000400020000);
  return _mm512_srlv_epi16(_mm512_shuffle_epi8(all, word), at);
}
INLINE B32 codes32(const Code<3> *v) {
  __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(v)));
  const __m512i word = _mm512_set_epi64(0x0c0b0c0b0b0a0b0a, 0x0b0a0a090a090a09, 0x0908090808070807, 0x0807070607060706,
                                        0x0605060505040504, 0x0504040304030403, 0x0302030202010201, 0x0201010001000100);
  const __m512i at = _mm512_set_epi64(0x0005000200070004, 0x0001000600030000, 0x0005000200070004, 0x0001000600030000,
                                      0x0005000200070004, 0x0001000600030000, 0x0005000200070004, 0x0001000600030000);
  return _mm512_srlv_epi16(_mm512_shuffle_epi8(all, word), at);
}

// Values at the set bits of `mask`, zeros elsewhere.
template <int BITS>
INLINE B32 expand32(uint32_t mask, const Code<BITS> *v, const Lut<bf16> &lut) {
  CLEARED(B32, spread, _mm512_setzero_si512());
  return _mm512_mask_expand_epi16(spread, mask, _mm512_permutexvar_epi16(codes32(v), lut.t));
}
template <int BITS>
INLINE F32 expand32(uint32_t mask, const Code<BITS> *v, const Lut<float> &lut) {
  CLEARED(B32, spread, _mm512_setzero_si512());
  spread = _mm512_mask_expand_epi16(spread, mask, codes32(v));
  I16 low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(spread));
  I16 high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(spread, 1));
  return {_mm512_maskz_permutexvar_ps(mask & 0xffff, low, lut.t), _mm512_maskz_permutexvar_ps(mask >> 16, high, lut.t)};
}
INLINE F32 expand32(uint32_t mask, const Code<8> *v, const Lut<float> &) {
  CLEARED(__m256i, spread, _mm256_setzero_si256());
  __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(v));
  asm("" : "+v"(all));
  spread = _mm256_mask_expand_epi8(spread, mask, all);
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(spread))),
          _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(spread, 1)))};
}

// 128 codes of a dense row (words.h says where each is), of which word(j) are those of columns 32j to 32j + 31.
template <int BITS, class T>
struct Chunk;
template <int BITS>
struct Chunk<BITS, float> {
  I16 low, high;
  MEMBER explicit Chunk(const Code<BITS> *v) {
    auto p = reinterpret_cast<const __m256i *>(v);
    auto q = reinterpret_cast<const __m128i *>(v);
    low = BITS == 4 ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(p)) : _mm512_cvtepu8_epi32(_mm_loadu_si128(q));
    high = BITS == 4 ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(p + 1)) : _mm512_cvtepu8_epi32(_mm_loadu_si128(q + 1));
  }
  MEMBER F32 word(int j, const Lut<float> &lut) const {
    return {lut.at(_mm512_srli_epi32(low, BITS * j)), lut.at(_mm512_srli_epi32(high, BITS * j))};
  }
};
template <int BITS>
struct Chunk<BITS, bf16> {
  B32 all;
  MEMBER explicit Chunk(const Code<BITS> *v) {
    if (BITS == 4) all = _mm512_loadu_si512(v);
    else all = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(v)));
  }
  MEMBER B32 word(int j, const Lut<bf16> &lut) const {
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(all, BITS * j), lut.t);
  }
};
template <>
struct Chunk<8, float> {
  const Code<8> *v;
  MEMBER explicit Chunk(const Code<8> *codes) : v(codes) {}
  MEMBER F32 word(int j, const Lut<float> &) const {
    return {_mm512_cvtepi32_ps(codes16(v + 32 * j)), _mm512_cvtepi32_ps(codes16(v + 32 * j + 16))};
  }
};
template <>
struct Chunk<3, float> {
  const Code<3> *v;
  MEMBER explicit Chunk(const Code<3> *codes) : v(codes) {}
  MEMBER F32 word(int j, const Lut<float> &lut) const { return {lut.at(codes16(v + 12 * j)), lut.at(codes16(v + 12 * j + 6))}; }
};
template <>
struct Chunk<3, bf16> {
  const Code<3> *v;
  MEMBER explicit Chunk(const Code<3> *codes) : v(codes) {}
  MEMBER B32 word(int j, const Lut<bf16> &lut) const { return _mm512_permutexvar_epi16(codes32(v + 12 * j), lut.t); }
};
