// Whole numbers on AVX-512 (VNNI, VBMI), beside the floats of avx512.h. The int_ headers of other ISAs have the same
// words.

typedef __m512i Bytes;  // 64 bytes: 16 rows of W by 4 columns
typedef __m512i I16;    // 16 int32

constexpr int kByteZero = 128;  // code of 0 among 8-bit weights as decoded here: dot takes unsigned weights
constexpr int kXOffset = 128;   // dot_signed takes x with this added

INLINE I16 zero_i16() { return _mm512_setzero_si512(); }
INLINE I16 splat_i(int32_t v) { return _mm512_set1_epi32(v); }
INLINE I16 load_i16(const int32_t *p) { return _mm512_loadu_si512(p); }
INLINE I16 load_u8(const uint8_t *p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
INLINE I16 add_i(I16 a, I16 b) { return _mm512_add_epi32(a, b); }
INLINE I16 sub_i(I16 a, I16 b) { return _mm512_sub_epi32(a, b); }
INLINE I16 mul_i(I16 a, I16 b) { return _mm512_mullo_epi32(a, b); }
INLINE F16 to_floats(I16 v) { return _mm512_cvtepi32_ps(v); }
// Whole numbers of -128 .. 127 to bytes.
INLINE void store_bytes(int8_t *p, F16 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

INLINE Bytes load_bytes(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE void store_bytes(uint8_t *p, Bytes v) { _mm512_store_si512(p, v); }
INLINE Bytes splat_bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
// Lane i of 16 numbers of 0 .. 255 to all 4 bytes of lane i.
INLINE Bytes four_times(I16 v) { return _mm512_mullo_epi32(v, _mm512_set1_epi32(0x01010101)); }

// 4 bytes of x, again and again.
INLINE Bytes four_columns(const int8_t *x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}
// acc lane i += the sum over j < 4 of w[4i + j] x[4i + j]; w holds codes of B bits as decoded below, x signed bytes.
template <int B>
INLINE I16 dot(I16 acc, Bytes w, Bytes x) {
  return _mm512_dpbusd_epi32(acc, w, x);
}

// 64 codes of B bits that follow each other.
template <int B>
INLINE Bytes codes64(const uint8_t *p) {
  if constexpr (B == 8) return load_bytes(p);
  if constexpr (B == 4) {  // a byte to two: the word b | b << 4 has both nibbles at the low end of its bytes
    __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    return _mm512_and_si512(_mm512_or_si512(b, _mm512_slli_epi16(b, 4)), splat_bytes(15));
  }
  const __m512i shifts = _mm512_set1_epi64(0x2624222006040200);
  __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, b), splat_bytes(3));
}

// 4 steps of 64 codes each: those of 8 / B steps lie in the same bytes, the first lowest.
template <int B>
INLINE void codes4(const uint8_t *p, Bytes *out) {
  for (int i = 0; i < 4; ++i) {
    constexpr int kTogether = 8 / B;
    Bytes all = load_bytes(p + 64 * (i / kTogether));
    int shift = B * (i % kTogether);
    out[i] = B == 8 ? all : _mm512_and_si512(_mm512_srli_epi16(all, shift), splat_bytes((1 << B) - 1));
  }
}

// Codes at the set bits of `mask` in order, `rest` elsewhere. The copy of `rest` has to be a register of its own:
// vexpand waits for the old value of its destination.
INLINE Bytes expand64(Bytes rest, uint64_t mask, Bytes codes) {
  Bytes out = rest;
  asm("" : "+v"(out), "+v"(codes));
  return _mm512_mask_expand_epi8(out, mask, codes);
}

// ---- steps of slices: lanes are rows that have columns of their own

// w - zero in the first `lanes` lanes, 0 in the others.
INLINE Bytes centred(Bytes w, Bytes zero, int lanes) {
  return _mm512_maskz_sub_epi8(_bzhi_u64(~uint64_t{0}, 4 * lanes), w, zero);
}
// acc lane i += the sum over j < 4 of w[4i + j] x[4i + j]; x has kXOffset added, w is signed.
INLINE I16 dot_signed(I16 acc, Bytes x, Bytes w) { return _mm512_dpbusd_epi32(acc, x, w); }
INLINE Bytes minus(Bytes w, Bytes zero) { return _mm512_sub_epi8(w, zero); }
// Lane r of the result is lane rank[r] of v.
INLINE I16 unsort_i(I16 v, uint64_t ranks) { return _mm512_castps_si512(unsort(_mm512_castsi512_ps(v), ranks)); }

// The positions of a step: of each of 64 bytes, or (RUN == 4) of each of 16 lanes. SHARE lanes have the same.
template <int SHARE, int RUN>
struct XPlaces {
  __m512i at;
  MEMBER explicit XPlaces(const uint8_t *p) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    at = RUN == 4 ? load_u8(p) : _mm512_loadu_si512(p);
    if (SHARE > 1) at = _mm512_permutexvar_epi32(_mm512_srli_epi32(lane, __builtin_ctz(SHARE)), at);
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
  __m512i low, high;
  MEMBER void load(const int8_t *x) { low = _mm512_loadu_si512(x), high = _mm512_loadu_si512(x + 64); }
  MEMBER Bytes at(const XPlaces<SHARE, RUN> &p, int) const {
    return RUN == 4 ? _mm512_permutex2var_epi32(low, p.at, high) : _mm512_permutex2var_epi8(low, p.at, high);
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
  int64_t eight;
  __builtin_memcpy(&eight, x, 8);
  return _mm512_set1_epi64(eight);
}
// Columns of 0 .. 7 of the 4 bytes of each lane: of step s of the 4 that share `all`, two bits in each byte.
INLINE Bytes places_of(Bytes all, int s) {
  const __m512i low = splat_bytes(3), second = _mm512_set1_epi32(0x04040000);
  return _mm512_ternarylogic_epi32(s ? _mm512_srli_epi16(all, 2 * s) : all, low, second, 0xea);  // a & b | c
}
INLINE Bytes at_places(Bytes x, Bytes places) { return _mm512_shuffle_epi8(x, places); }
