// Vocabulary on AVX2 and FMA: 16 lanes are two registers; there is no expand, so tables of byte positions stand in.
#include <immintrin.h>

struct F16 {
  __m256 a, b;
};
struct B32 {
  __m256i a, b;
};

INLINE F16 zero16() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE F16 splat(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
INLINE F16 add(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE F16 sub(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE F16 mul(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE F16 div16(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE F16 fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE F16 max16(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }  // y where NaN
INLINE F16 min16(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE F16 abs16(F16 x) {
  __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE F16 round16(F16 x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
INLINE __m256 exp2i8(__m256 n) {
  __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
// 2^n for whole n in [-127, 128]; 0 and infinity at the ends
INLINE F16 exp2i(F16 n) { return {exp2i8(n.a), exp2i8(n.b)}; }

INLINE __m256 widen(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
INLINE __m128i load8(const bf16 *p) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)); }
INLINE F16 load16(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE F16 load16(const bf16 *p) { return {widen(load8(p)), widen(load8(p + 8))}; }
INLINE void store16(float *p, F16 v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
template <class T>
INLINE F16 load_n(const T *p, int n) {
  if (n == 16) return load16(p);
  T copy[16] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return load16(copy);
}
INLINE void store_n(float *p, int n, F16 v) {
  if (n == 16) return store16(p, v);
  float copy[16];
  store16(copy, v);
  for (int i = 0; i < n; ++i) p[i] = copy[i];
}
INLINE void store_n(bf16 *p, int n, F16 v) {
  float copy[16];
  store16(copy, v);
  for (int i = 0; i < n; ++i) p[i] = to_bf16(copy[i]);
}

// ---- 32 columns of x or of a row of W

struct F32 {
  F16 a, b;
};
INLINE F32 load32(const float *p) { return {load16(p), load16(p + 16)}; }
INLINE B32 load32(const bf16 *p) {
  auto q = reinterpret_cast<const __m256i *>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}

// kSpread[mask][j]: which kept value stands at column j of 8; 0x80 where none does.
struct Spread {
  alignas(16) uint8_t at[256][8];
  constexpr Spread() : at() {
    for (int mask = 0; mask < 256; ++mask)
      for (int j = 0, kept = 0; j < 8; ++j) at[mask][j] = (mask >> j & 1) ? kept++ : 0x80;
  }
};
static constexpr Spread kSpread;

// 8 columns: vpermps takes the low 3 bits of each position; the sign bit of a position says "nothing here".
INLINE __m256 expand8(uint32_t mask, const float *v) {
  __m256i p = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(kSpread.at[mask])));
  __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(v), p);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(p, 31)), spread);
}
INLINE F32 expand32(uint32_t mask, const float *v) {
  F32 out;
  out.a.a = expand8(mask & 255, v), v += __builtin_popcount(mask & 255);
  out.a.b = expand8(mask >> 8 & 255, v), v += __builtin_popcount(mask >> 8 & 255);
  out.b.a = expand8(mask >> 16 & 255, v), v += __builtin_popcount(mask >> 16 & 255);
  out.b.b = expand8(mask >> 24, v);
  return out;
}
// 8 columns of bf16: byte positions 2p and 2p + 1; pshufb writes zero where the sign bit is set.
INLINE __m128i expand8(uint32_t mask, const bf16 *v) {
  __m128i p = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(kSpread.at[mask]));
  __m128i twice = _mm_add_epi8(_mm_unpacklo_epi8(p, p), _mm_unpacklo_epi8(p, p));  // 0x80 + 0x80 would lose the sign
  __m128i none = _mm_unpacklo_epi8(p, p);
  twice = _mm_or_si128(_mm_add_epi8(twice, _mm_set1_epi16(0x0100)), _mm_and_si128(none, _mm_set1_epi8(-128)));
  return _mm_shuffle_epi8(load8(v), twice);
}
INLINE B32 expand32(uint32_t mask, const bf16 *v) {
  __m128i q[4];
  for (int i = 0; i < 4; ++i, mask >>= 8) {
    q[i] = expand8(mask & 255, v);
    v += __builtin_popcount(mask & 255);
  }
  return {_mm256_set_m128i(q[1], q[0]), _mm256_set_m128i(q[3], q[2])};
}

// 32 values as floats, in the order of their columns
INLINE F32 numbers(const F32 &v) { return v; }
INLINE F32 numbers(B32 v) {
  alignas(32) bf16 wide[32];
  _mm256_store_si256(reinterpret_cast<__m256i *>(wide), v.a), _mm256_store_si256(reinterpret_cast<__m256i *>(wide + 16), v.b);
  return {load16(wide), load16(wide + 16)};
}

INLINE F16 mac32(F16 acc, const F32 &w, const F32 &x) { return fma(w.b, x.b, fma(w.a, x.a, acc)); }
INLINE F16 even(B32 v) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(v.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(v.b, 16))};
}
INLINE F16 odd(B32 v) {
  __m256i high = _mm256_set1_epi32(-65536);
  return {_mm256_castsi256_ps(_mm256_and_si256(v.a, high)), _mm256_castsi256_ps(_mm256_and_si256(v.b, high))};
}
INLINE F16 mac32(F16 acc, B32 w, B32 x) { return fma(odd(w), odd(x), fma(even(w), even(x), acc)); }

// acc lane i += w[2i] x[0] + w[2i+1] x[1]
INLINE F16 mac_pairs(F16 acc, const bf16 *w, const bf16 *x) {
  B32 both = load32(w);
  return fma(odd(both), splat(to_float(x[1])), fma(even(both), splat(to_float(x[0])), acc));
}

// out[i] = sum of the 16 lanes of v[i]
INLINE void sums4(const F16 *v, float *out) {
  __m256 ab = _mm256_hadd_ps(_mm256_add_ps(v[0].a, v[0].b), _mm256_add_ps(v[1].a, v[1].b));
  __m256 cd = _mm256_hadd_ps(_mm256_add_ps(v[2].a, v[2].b), _mm256_add_ps(v[3].a, v[3].b));
  __m256 all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

struct Kept {
  alignas(8) uint8_t at[256][8];
  constexpr Kept() : at() {
    for (int mask = 0; mask < 256; ++mask)
      for (int j = 0, kept = 0; j < 8; ++j)
        if (mask >> j & 1) at[mask][kept++] = static_cast<uint8_t>(j);
  }
};
static constexpr Kept kKept;

// Positions of the set bits, plus `base`, to out[0 .. popcount); writes up to 32 entries.
INLINE void positions32(uint32_t mask, uint32_t base, uint32_t *out) {
  for (int i = 0; i < 4; ++i, mask >>= 8, base += 8) {
    __m256i p = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(kKept.at[mask & 255])));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), _mm256_add_epi32(p, _mm256_set1_epi32(static_cast<int>(base))));
    out += __builtin_popcount(mask & 255);
  }
}

// ---- steps of the sliced layout: lanes are rows, R neighbouring lanes share a position

template <class T>
struct Table {  // 128 values of x, gathered from memory
  const T *x;
  MEMBER Table() {}
  MEMBER explicit Table(const T *p) : x(p) {}
};
INLINE __m256 gather8(const Table<float> &t, __m256i p) { return _mm256_i32gather_ps(t.x, p, 4); }
// The 4 bytes at a position hold the value in their low half.
INLINE __m256 gather8(const Table<bf16> &t, __m256i p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_i32gather_epi32(reinterpret_cast<const int *>(t.x), p, 2), 16));
}

INLINE F16 keep_first(F16 v, int lanes) {
  alignas(32) static const int32_t window[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  const float *w = reinterpret_cast<const float *>(window) + 16 - lanes;
  return {_mm256_and_ps(v.a, _mm256_loadu_ps(w)), _mm256_and_ps(v.b, _mm256_loadu_ps(w + 8))};
}

struct Positions {
  __m256i a, b;
  MEMBER Positions(const uint8_t *p, int stride, int offset, int shared) {
    alignas(16) uint8_t byte[16];
    for (int i = 0; i < 16; ++i) byte[i] = p[i / shared * stride + offset];
    __m128i v = _mm_load_si128(reinterpret_cast<const __m128i *>(byte));
    a = _mm256_cvtepu8_epi32(v), b = _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8));
  }
  MEMBER void store(uint32_t *out) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), a);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + 8), b);
  }
  template <class T>
  MEMBER F16 of(const Table<T> &x) const {
    return {gather8(x, a), gather8(x, b)};
  }
};

template <class T, int R>
struct Step;
template <int R>
struct Step<float, R> {
  F16 value;
  Positions position;
  MEMBER Step(const float *v, const uint8_t *p, int lanes) : value(keep_first(load16(v), lanes)), position(p, 1, 0, R) {}
  MEMBER F16 mac(F16 acc, const Table<float> &x) const { return fma(value, position.of(x), acc); }
  MEMBER void spill(float *v, uint32_t *p) const {
    store16(v, value);
    position.store(p);
  }
};
template <int R>
struct Step<bf16, R> {
  F16 first, second;
  Positions p_first, p_second;
  MEMBER Step(const bf16 *v, const uint8_t *p, int lanes)
      : first(keep_first(even(load32(v)), lanes)),
        second(keep_first(odd(load32(v)), lanes)),
        p_first(p, 2, 0, R),
        p_second(p, 2, 1, R) {}
  MEMBER F16 mac(F16 acc, const Table<bf16> &x) const {
    return fma(second, p_second.of(x), fma(first, p_first.of(x), acc));
  }
  MEMBER void spill(float *v, uint32_t *p) const {
    store16(v, first);
    store16(v + 16, second);
    p_first.store(p);
    p_second.store(p + 16);
  }
};

// Lane r of the result is lane rank[r] of v; `ranks` holds 16 numbers of 4 bits.
INLINE F16 unsort(F16 v, uint64_t ranks) {
  float in[16], out[16];
  store16(in, v);
  for (int i = 0; i < 16; ++i) out[i] = in[ranks >> (4 * i) & 15];
  return load16(out);
}

INLINE void transpose8(__m256 *r) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
// Rows become columns: out[i] lane j = in[j] lane i.
INLINE void transpose16(F16 *r) {
  __m256 q[4][8];
  for (int i = 0; i < 8; ++i) q[0][i] = r[i].a, q[1][i] = r[i + 8].a, q[2][i] = r[i].b, q[3][i] = r[i + 8].b;
  for (int i = 0; i < 4; ++i) transpose8(q[i]);
  for (int i = 0; i < 8; ++i) r[i] = {q[0][i], q[1][i]}, r[i + 8] = {q[2][i], q[3][i]};
}
