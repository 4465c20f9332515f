// Vocabulary on AVX-512 (F, BW, VL, DQ, VBMI2; BF16 when __AVX512BF16__). The other ISA headers define the same words.
#include <immintrin.h>

typedef __m512 F16;   // 16 floats
typedef __m512i B32;  // 32 bf16, seen as 16 pairs

INLINE F16 zero16() { return _mm512_setzero_ps(); }
INLINE F16 splat(float v) { return _mm512_set1_ps(v); }
INLINE F16 add(F16 a, F16 b) { return _mm512_add_ps(a, b); }
INLINE F16 sub(F16 a, F16 b) { return _mm512_sub_ps(a, b); }
INLINE F16 mul(F16 a, F16 b) { return _mm512_mul_ps(a, b); }
INLINE F16 div16(F16 a, F16 b) { return _mm512_div_ps(a, b); }
INLINE F16 fma(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F16 max16(F16 a, F16 b) { return _mm512_max_ps(a, b); }  // b where either is NaN
INLINE F16 min16(F16 a, F16 b) { return _mm512_min_ps(a, b); }
INLINE F16 abs16(F16 a) { return _mm512_abs_ps(a); }
INLINE F16 round16(F16 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2^n for whole n in [-127, 128]; 0 and infinity at the ends
INLINE F16 exp2i(F16 n) {
  __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
}

INLINE __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
INLINE F16 widen(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
INLINE F16 load16(const float *p) { return _mm512_loadu_ps(p); }
INLINE F16 load16(const bf16 *p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
INLINE void store16(float *p, F16 v) { _mm512_storeu_ps(p, v); }
INLINE F16 load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
INLINE F16 load_n(const bf16 *p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
INLINE void store_n(float *p, int n, F16 v) { _mm512_mask_storeu_ps(p, first(n), v); }
// Round to nearest even; a NaN keeps its sign and upper bits and stays a NaN.
INLINE void store_n(bf16 *p, int n, F16 v) {
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// ---- 32 columns of x or of a row of W

struct F32 {
  F16 a, b;
};
INLINE F32 load32(const float *p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
INLINE B32 load32(const bf16 *p) { return _mm512_loadu_si512(p); }

// vexpand waits for the old value of its destination even when it zeroes it (measured on Zen 5: 5 cycles instead of
// 1), so the destination is a register that was just cleared and the compiler may not merge the two.
#define CLEARED(type, name, zero) type name = zero; asm("" : "+v"(name))

// Values at the set bits of `mask`, zeros elsewhere; reads up to 32 values from v, used or not. A full load and a
// register expand: the hardware prefetcher does not follow masked loads.
INLINE F32 expand32(uint32_t mask, const float *v) {
  CLEARED(F16, a, zero16());
  CLEARED(F16, b, zero16());
  F16 lo = _mm512_loadu_ps(v), hi = _mm512_loadu_ps(v + __builtin_popcount(mask & 0xffff));
  asm("" : "+v"(lo), "+v"(hi));
  return {_mm512_mask_expand_ps(a, mask & 0xffff, lo), _mm512_mask_expand_ps(b, mask >> 16, hi)};
}
INLINE B32 expand32(uint32_t mask, const bf16 *v) {
  CLEARED(B32, a, _mm512_setzero_si512());
  B32 all = _mm512_loadu_si512(v);
  asm("" : "+v"(all));
  return _mm512_mask_expand_epi16(a, mask, all);
}

// 32 values as floats, in the order of their columns
INLINE F32 numbers(const F32 &v) { return v; }
INLINE F32 numbers(B32 v) { return {widen(_mm512_castsi512_si256(v)), widen(_mm512_extracti64x4_epi64(v, 1))}; }

INLINE F16 mac32(F16 acc, const F32 &w, const F32 &x) { return fma(w.b, x.b, fma(w.a, x.a, acc)); }
INLINE F16 even(B32 v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
INLINE F16 odd(B32 v) { return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(-65536))); }
INLINE F16 mac32(F16 acc, B32 w, B32 x) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
#else
  return fma(odd(w), odd(x), fma(even(w), even(x), acc));
#endif
}

// acc lane i += w[2i] x[0] + w[2i+1] x[1]
INLINE F16 mac_pairs(F16 acc, const bf16 *w, const bf16 *x) {
  int32_t pair;
  __builtin_memcpy(&pair, x, 4);
  return mac32(acc, load32(w), _mm512_set1_epi32(pair));
}

// out[i] = sum of the 16 lanes of v[i]
INLINE void sums4(const F16 *v, float *out) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

// Positions of the set bits, plus `base`, to out[0 .. popcount); writes up to 32 entries.
INLINE void positions32(uint32_t mask, uint32_t base, uint32_t *out) {
  const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  CLEARED(__m512i, a, _mm512_setzero_si512());
  CLEARED(__m512i, b, _mm512_setzero_si512());
  __m512i lo = _mm512_add_epi32(iota, _mm512_set1_epi32(static_cast<int>(base)));
  __m512i hi = _mm512_add_epi32(lo, _mm512_set1_epi32(16));
  _mm512_storeu_si512(out, _mm512_mask_compress_epi32(a, mask & 0xffff, lo));
  _mm512_storeu_si512(out + __builtin_popcount(mask & 0xffff), _mm512_mask_compress_epi32(b, mask >> 16, hi));
}

// ---- steps of the sliced layout: lanes are rows, R neighbouring lanes share a position

// 128 values of x in registers, looked up by 7-bit positions.
template <class T>
struct Table;
template <>
struct Table<float> {
  F16 t[8];
  MEMBER Table() {}
  MEMBER explicit Table(const float *x) {
    for (int i = 0; i < 8; ++i) t[i] = _mm512_loadu_ps(x + 16 * i);
  }
  MEMBER F16 at(__m512i i) const {
    __mmask16 k32 = _mm512_test_epi32_mask(i, _mm512_set1_epi32(32));
    __mmask16 k64 = _mm512_test_epi32_mask(i, _mm512_set1_epi32(64));
    F16 a = _mm512_permutex2var_ps(t[0], i, t[1]), b = _mm512_permutex2var_ps(t[2], i, t[3]);
    F16 c = _mm512_permutex2var_ps(t[4], i, t[5]), d = _mm512_permutex2var_ps(t[6], i, t[7]);
    return _mm512_mask_blend_ps(k64, _mm512_mask_blend_ps(k32, a, b), _mm512_mask_blend_ps(k32, c, d));
  }
};
template <>
struct Table<bf16> {
  B32 t[4];
  MEMBER Table() {}
  MEMBER explicit Table(const bf16 *x) {
    for (int i = 0; i < 4; ++i) t[i] = _mm512_loadu_si512(x + 32 * i);
  }
  MEMBER B32 at(__m512i i) const {
    __mmask32 k64 = _mm512_test_epi16_mask(i, _mm512_set1_epi16(64));
    return _mm512_mask_blend_epi16(k64, _mm512_permutex2var_epi16(t[0], i, t[1]),
                                   _mm512_permutex2var_epi16(t[2], i, t[3]));
  }
};

// The values and positions of one step. `lanes` of the 16 hold something; the rest are zero values.
template <class T, int R>
struct Step;
template <int R>
struct Step<float, R> {
  F16 value;
  __m512i position;
  MEMBER Step(const float *v, const uint8_t *p, int lanes) {
    value = _mm512_loadu_ps(v);
    asm("" : "+v"(value));  // a full load: see expand32
    value = _mm512_maskz_mov_ps(first(lanes), value);
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    if (R > 1) {
      alignas(16) int8_t spread[16];
      for (int i = 0; i < 16; ++i) spread[i] = static_cast<int8_t>(i / R);
      bytes = _mm_shuffle_epi8(bytes, _mm_load_si128(reinterpret_cast<const __m128i *>(spread)));
    }
    position = _mm512_cvtepu8_epi32(bytes);
  }
  MEMBER F16 mac(F16 acc, const Table<float> &x) const { return fma(value, x.at(position), acc); }
  MEMBER void spill(float *v, uint32_t *p) const {
    _mm512_storeu_ps(v, value);
    _mm512_storeu_si512(p, position);
  }
};
template <int R>
struct Step<bf16, R> {
  B32 value;
  __m512i position;
  MEMBER Step(const bf16 *v, const uint8_t *p, int lanes) {
    value = _mm512_loadu_si512(v);
    asm("" : "+v"(value));
    value = _mm512_maskz_mov_epi32(first(lanes), value);
    __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    if (R > 1) {
      bytes = _mm256_broadcastsi128_si256(_mm256_castsi256_si128(bytes));
      alignas(32) int8_t spread[32];
      for (int i = 0; i < 32; ++i) spread[i] = static_cast<int8_t>(i / 2 / R * 2 + i % 2);
      bytes = _mm256_shuffle_epi8(bytes, _mm256_load_si256(reinterpret_cast<const __m256i *>(spread)));
    }
    position = _mm512_cvtepu8_epi16(bytes);
  }
  MEMBER F16 mac(F16 acc, const Table<bf16> &x) const { return mac32(acc, value, x.at(position)); }
  MEMBER void spill(float *v, uint32_t *p) const {
    _mm512_storeu_ps(v, even(value));
    _mm512_storeu_ps(v + 16, odd(value));
    _mm512_storeu_si512(p, _mm512_and_si512(position, _mm512_set1_epi32(0xffff)));
    _mm512_storeu_si512(p + 16, _mm512_srli_epi32(position, 16));
  }
};

// Lane r of the result is lane rank[r] of v; `ranks` holds 16 numbers of 4 bits.
INLINE F16 unsort(F16 v, uint64_t ranks) {
  __m128i lo = _mm_cvtsi64_si128(static_cast<int64_t>(ranks & 0x0f0f0f0f0f0f0f0full));
  __m128i hi = _mm_cvtsi64_si128(static_cast<int64_t>((ranks >> 4) & 0x0f0f0f0f0f0f0f0full));
  return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(lo, hi)), v);
}

// Rows become columns: out[i] lane j = in[j] lane i.
INLINE void transpose16(F16 *r) {
  F16 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int i = 0; i < 4; ++i) {  // r[4q + i] holds column 4l + i of rows 4q .. 4q+3 in its 128-bit lane l
    F16 a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    F16 c = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd), d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_f32x4(a, b, 0x88);
    t[i + 8] = _mm512_shuffle_f32x4(a, b, 0xdd);
    t[i + 4] = _mm512_shuffle_f32x4(c, d, 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
