// Whole numbers on AVX2, beside the floats of avx2.h; with AVX-VNNI (__AVXVNNI__) its dot product.

struct Bytes {
  __m256i a, b;
};
struct I16 {
  __m256i a, b;
};

#ifdef __AVXVNNI__
constexpr int kByteZero = 128;
constexpr int kXOffset = 128;
#else
// Without vpdpbusd 8-bit weights are taken signed: the sums of two unsigned ones would not fit 16 bits.
constexpr int kByteZero = 0;
constexpr int kXOffset = 0;
#endif

INLINE __m256i whole(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
INLINE __m128i half(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
INLINE I16 zero_i16() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE I16 splat_i(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
INLINE I16 load_i16(const int32_t *p) { return {whole(p), whole(p + 8)}; }
INLINE I16 load_u8(const uint8_t *p) {
  return {_mm256_cvtepu8_epi32(half(p)), _mm256_cvtepu8_epi32(_mm_srli_si128(half(p), 8))};
}
INLINE I16 add_i(I16 x, I16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE I16 sub_i(I16 x, I16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
INLINE I16 mul_i(I16 x, I16 y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
INLINE F16 to_floats(I16 v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
// Whole numbers of -128 .. 127 to bytes.
INLINE void store_bytes(int8_t *p, F16 v) {
  __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b));  // a0 b0 a1 b1, 4 of each
  words = _mm256_permute4x64_epi64(words, 0xd8);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), bytes);
}

INLINE Bytes load_bytes(const uint8_t *p) { return {whole(p), whole(p + 32)}; }
INLINE void store_bytes(uint8_t *p, Bytes v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), v.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p + 32), v.b);
}
INLINE __m256i splat8(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
INLINE Bytes splat_bytes(int v) { return {splat8(v), splat8(v)}; }
// Lane i of 16 numbers of 0 .. 255 to all 4 bytes of lane i.
INLINE Bytes four_times(I16 v) {
  I16 all = mul_i(v, splat_i(0x01010101));
  return {all.a, all.b};
}

INLINE __m256i pairs_i32(__m256i words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }
// Sums of two products of signed bytes, with the sign of w at x.
INLINE __m256i signed_pairs(__m256i x, __m256i w) {
  return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
template <int B>
INLINE __m256i dot8(__m256i acc, __m256i w, __m256i x) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(acc, w, x);
#else
  // Two products of at most 127 x 127, or 15 x 127, fit 16 bits; with |w| unsigned its sign goes to x.
  __m256i words = B == 8 ? signed_pairs(x, w) : _mm256_maddubs_epi16(w, x);
  return _mm256_add_epi32(acc, pairs_i32(words));
#endif
}

// 4 bytes of x, again and again.
INLINE Bytes four_columns(const int8_t *x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  __m256i all = _mm256_set1_epi32(four);
  return {all, all};
}
// acc lane i += the sum over j < 4 of w[4i + j] x[4i + j]; w holds codes of B bits as decoded below, x signed bytes.
template <int B>
INLINE I16 dot(const I16 &acc, const Bytes &w, const Bytes &x) {
  return {dot8<B>(acc.a, w.a, x.a), dot8<B>(acc.b, w.b, x.b)};
}

INLINE __m256i as_decoded(__m256i v) {  // 8-bit codes, which packs hold as q + 128
  return kByteZero ? v : _mm256_xor_si256(v, _mm256_set1_epi8(-128));
}
INLINE __m256i shifted(__m256i v, int shift, int bits) {
  return _mm256_and_si256(_mm256_srli_epi16(v, shift), splat8((1 << bits) - 1));
}
// 16 bytes of 4-bit codes to 32 bytes, or 8 of 2-bit codes.
INLINE __m256i spread_codes(__m256i b, int bits) {  // b: 16-bit lanes with 2 codes, or 32-bit lanes with 4
  if (bits == 4) return shifted(_mm256_or_si256(b, _mm256_slli_epi16(b, 4)), 0, 4);
  b = _mm256_or_si256(b, _mm256_slli_epi32(b, 12));  // the high nibble to the third byte
  return shifted(_mm256_or_si256(b, _mm256_slli_epi32(b, 6)), 0, 2);
}
// 64 codes of B bits that follow each other.
template <int B>
INLINE Bytes codes64(const uint8_t *p) {
  if constexpr (B == 8) return {as_decoded(whole(p)), as_decoded(whole(p + 32))};
  if constexpr (B == 4)
    return {spread_codes(_mm256_cvtepu8_epi16(half(p)), 4), spread_codes(_mm256_cvtepu8_epi16(half(p + 16)), 4)};
  I16 lanes = load_u8(p);
  return {spread_codes(lanes.a, 2), spread_codes(lanes.b, 2)};
}

// 4 steps of 64 codes each: those of 8 / B steps lie in the same bytes, the first lowest.
template <int B>
INLINE void codes4(const uint8_t *p, Bytes *out) {
  constexpr int kTogether = 8 / B;
  for (int i = 0; i < 4; ++i) {
    const uint8_t *at = p + 64 * (i / kTogether);
    int shift = B * (i % kTogether);
    if (B == 8) out[i] = codes64<8>(at);
    else out[i] = {shifted(whole(at), shift, B), shifted(whole(at + 32), shift, B)};
  }
}

// 16 positions: codes at the set bits of two bytes of mask, the sign bit elsewhere says that `rest` stands there.
INLINE __m128i expand16(__m128i rest, uint32_t mask, const uint8_t *code) {
  __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(kSpread.at[mask & 255]));
  __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(kSpread.at[mask >> 8]));
  high = _mm_add_epi8(high, _mm_set1_epi8(static_cast<char>(__builtin_popcount(mask & 255))));
  __m128i at = _mm_unpacklo_epi64(low, high);  // 0x80 + 8 keeps its sign
  return _mm_blendv_epi8(_mm_shuffle_epi8(half(code), at), rest, at);
}
// Codes at the set bits of `mask` in order, `rest` elsewhere.
INLINE Bytes expand64(const Bytes &rest, uint64_t mask, const Bytes &codes) {
  alignas(32) uint8_t copy[80];
  store_bytes(copy, codes);
  const uint8_t *code = copy;
  __m128i part[4], old[4];
  __builtin_memcpy(old, &rest, sizeof old);
  for (int i = 0; i < 4; ++i, mask >>= 16) {
    part[i] = expand16(old[i], mask & 65535, code);
    code += __builtin_popcount(mask & 65535);
  }
  return {_mm256_set_m128i(part[1], part[0]), _mm256_set_m128i(part[3], part[2])};
}

// ---- steps of slices: lanes are rows that have columns of their own

// w - zero in the first `lanes` lanes, 0 in the others.
INLINE Bytes centred(const Bytes &w, const Bytes &zero, int lanes) {
  __m256i a = _mm256_sub_epi8(w.a, zero.a), b = _mm256_sub_epi8(w.b, zero.b);
  F16 kept = keep_first({_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)}, lanes);
  return {_mm256_castps_si256(kept.a), _mm256_castps_si256(kept.b)};
}
INLINE __m256i dot8_signed(__m256i acc, __m256i x, __m256i w) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(acc, x, w);
#else
  return _mm256_add_epi32(acc, pairs_i32(signed_pairs(x, w)));
#endif
}
// acc lane i += the sum over j < 4 of w[4i + j] x[4i + j]; x has kXOffset added, w is signed.
INLINE I16 dot_signed(const I16 &acc, const Bytes &x, const Bytes &w) {
  return {dot8_signed(acc.a, x.a, w.a), dot8_signed(acc.b, x.b, w.b)};
}
INLINE Bytes minus(const Bytes &w, const Bytes &zero) {
  return {_mm256_sub_epi8(w.a, zero.a), _mm256_sub_epi8(w.b, zero.b)};
}
// Lane r of the result is lane rank[r] of v.
INLINE I16 unsort_i(const I16 &v, uint64_t ranks) {
  F16 out = unsort({_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)}, ranks);
  return {_mm256_castps_si256(out.a), _mm256_castps_si256(out.b)};
}

// The positions of a step: of each of 64 bytes, or (RUN == 4) of each of 16 lanes. SHARE lanes have the same.
template <int SHARE, int RUN>
struct XPlaces {
  I16 at;
  MEMBER explicit XPlaces(const uint8_t *p) {
    alignas(32) uint8_t spread[64];
    constexpr int kWidth = 4 / RUN;  // bytes of a lane
    for (int i = 0; i < 16 && SHARE > 1; ++i) __builtin_memcpy(spread + kWidth * i, p + kWidth * (i / SHARE), kWidth);
    const uint8_t *from = SHARE > 1 ? spread : p;
    if (RUN == 4) at = load_u8(from);
    else at = {whole(from), whole(from + 32)};
  }
};
template <>
struct XPlaces<16, 4> {
  int at;
  MEMBER explicit XPlaces(const uint8_t *p) : at(*p) {}
};
// 128 columns of a row of x; or, where all lanes have the same 4, where they lie: `wide` rows side by side.
template <int SHARE, int RUN>
struct XTable {
  const int8_t *x;
  MEMBER void load(const int8_t *p) { x = p; }
  // Each 16 columns give the positions that are theirs: the others have a sign bit, for which pshufb writes 0.
  MEMBER __m256i bytes(__m256i p) const {
    __m256i out = _mm256_setzero_si256();
    for (int i = 0; i < 8; ++i) {
      __m256i part = _mm256_broadcastsi128_si256(half(x + 16 * i));
      __m256i mine = _mm256_adds_epu8(_mm256_xor_si256(p, splat8(16 * i)), splat8(0x70));
      out = _mm256_or_si256(out, _mm256_shuffle_epi8(part, mine));
    }
    return out;
  }
  MEMBER Bytes at(const XPlaces<SHARE, RUN> &p, int) const {
    if (RUN == 1) return {bytes(p.at.a), bytes(p.at.b)};
    auto from = reinterpret_cast<const int *>(x);
    return {_mm256_i32gather_epi32(from, p.at.a, 4), _mm256_i32gather_epi32(from, p.at.b, 4)};
  }
};
template <>
struct XTable<16, 4> {
  const int8_t *x;
  MEMBER void load(const int8_t *p) { x = p; }
  MEMBER Bytes at(const XPlaces<16, 4> &p, int wide) const {
    return four_columns(x + 4 * wide * p.at);
  }
};

// ---- pairs: two of every 4 neighbouring columns

// 8 bytes of x, again and again.
INLINE Bytes eight_columns(const int8_t *x) {
  long long eight;
  __builtin_memcpy(&eight, x, 8);
  __m256i all = _mm256_set1_epi64x(eight);
  return {all, all};
}
// Columns of 0 .. 7 of the 4 bytes of each lane: of step s of the 4 that share `all`, two bits in each byte.
INLINE Bytes places_of(const Bytes &all, int s) {
  __m256i second = _mm256_set1_epi32(0x04040000);
  return {_mm256_or_si256(shifted(all.a, 2 * s, 2), second), _mm256_or_si256(shifted(all.b, 2 * s, 2), second)};
}
INLINE Bytes at_places(const Bytes &x, const Bytes &places) {
  return {_mm256_shuffle_epi8(x.a, places.a), _mm256_shuffle_epi8(x.b, places.b)};
}
