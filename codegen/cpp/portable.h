// Vocabulary in plain C++: 16 lanes are a vector type that GCC and Clang lower to whatever the machine has.

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
struct B32 {
  I16 pair;  // 16 pairs of bf16
};

INLINE F16 zero16() { return F16{}; }
INLINE F16 splat(float v) { return F16{} + v; }
INLINE F16 add(F16 a, F16 b) { return a + b; }
INLINE F16 sub(F16 a, F16 b) { return a - b; }
INLINE F16 mul(F16 a, F16 b) { return a * b; }
INLINE F16 div16(F16 a, F16 b) { return a / b; }
INLINE F16 fma(F16 a, F16 b, F16 c) { return a * b + c; }
INLINE F16 max16(F16 a, F16 b) { return a > b ? a : b; }  // b where either is NaN
INLINE F16 min16(F16 a, F16 b) { return a < b ? a : b; }
INLINE F16 abs16(F16 a) { return reinterpret_cast<F16>(reinterpret_cast<I16>(a) & 0x7fffffff); }
// To nearest even for |a| < 2^22, which is all that exp needs: the sum leaves no bits for a fraction.
INLINE F16 round16(F16 a) {
  F16 shifted = a + 12582912.f;
  asm("" : "+m"(shifted));  // keeps (a + c) - c from being folded
  return shifted - 12582912.f;
}
// 2^n for whole n in [-127, 128]; 0 and infinity at the ends
INLINE F16 exp2i(F16 n) {
  I16 bits;
  for (int i = 0; i < 16; ++i) bits[i] = static_cast<int32_t>(n[i] == n[i] ? n[i] : 0.f);
  return reinterpret_cast<F16>((bits + 127) << 23);
}

INLINE F16 load16(const float *p) {
  F16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE F16 load16(const bf16 *p) {
  F16 v;
  for (int i = 0; i < 16; ++i) v[i] = to_float(p[i]);
  return v;
}
INLINE void store16(float *p, F16 v) { __builtin_memcpy(p, &v, sizeof v); }
template <class T>
INLINE F16 load_n(const T *p, int n) {
  float copy[16] = {};
  for (int i = 0; i < n; ++i) copy[i] = to_float(p[i]);
  return load16(copy);
}
INLINE void store_n(float *p, int n, F16 v) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
INLINE void store_n(bf16 *p, int n, F16 v) {
  for (int i = 0; i < n; ++i) p[i] = to_bf16(v[i]);
}

// ---- 32 columns of x or of a row of W

struct F32 {
  F16 a, b;
};
INLINE F32 load32(const float *p) { return {load16(p), load16(p + 16)}; }
INLINE B32 load32(const bf16 *p) {
  B32 v;
  __builtin_memcpy(&v.pair, p, sizeof v.pair);
  return v;
}
template <class T>
INLINE auto expand32(uint32_t mask, const T *v) {
  T wide[32] = {};
  for (; mask; mask &= mask - 1) wide[__builtin_ctz(mask)] = *v++;
  return load32(wide);
}
INLINE F16 mac32(F16 acc, const F32 &w, const F32 &x) { return fma(w.b, x.b, fma(w.a, x.a, acc)); }
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the portable kernels take the first value of a pair from the low half; this machine is big-endian"
#endif
INLINE F16 even(B32 v) { return reinterpret_cast<F16>(v.pair << 16); }
INLINE F16 odd(B32 v) { return reinterpret_cast<F16>(v.pair & -65536); }
INLINE F16 mac32(F16 acc, const B32 &w, const B32 &x) { return fma(odd(w), odd(x), fma(even(w), even(x), acc)); }

// out[i] = sum of the 16 lanes of v[i]
INLINE void sums4(const F16 *v, float *out) {
  for (int i = 0; i < 4; ++i) {
    float s[4] = {};
    for (int j = 0; j < 16; ++j) s[j % 4] += v[i][j];
    out[i] = (s[0] + s[2]) + (s[1] + s[3]);
  }
}
// Positions of the set bits, plus `base`, to out[0 .. popcount); writes up to 32 entries.
INLINE void positions32(uint32_t mask, uint32_t base, uint32_t *out) {
  for (; mask; mask &= mask - 1) *out++ = base + static_cast<uint32_t>(__builtin_ctz(mask));
}

// ---- steps of the sliced layout: lanes are rows, R neighbouring lanes share a position

template <class T>
struct Table {
  const T *x;
  MEMBER Table() {}
  MEMBER explicit Table(const T *p) : x(p) {}
};
INLINE float at(const Table<float> &t, int p) { return t.x[p]; }
INLINE float at(const Table<bf16> &t, int p) { return to_float(t.x[p]); }

template <class T, int R>
struct Step {
  static constexpr int kPer = sizeof(T) == 4 ? 1 : 2;  // values of one row in a step
  const T *v;
  const uint8_t *p;
  int lanes;
  MEMBER Step(const T *values, const uint8_t *positions, int count) : v(values), p(positions), lanes(count) {}
  MEMBER F16 mac(F16 acc, const Table<T> &x) const {
    for (int i = 0; i < lanes; ++i)
      for (int u = 0; u < kPer; ++u) acc[i] += to_float(v[kPer * i + u]) * at(x, p[i / R * kPer + u]);
    return acc;
  }
  MEMBER void spill(float *out, uint32_t *where) const {
    for (int u = 0; u < kPer; ++u) {
      for (int i = 0; i < 16; ++i) {
        out[16 * u + i] = i < lanes ? to_float(v[kPer * i + u]) : 0.f;
        where[16 * u + i] = p[i / R * kPer + u];
      }
    }
  }
};

// Lane r of the result is lane rank[r] of v; `ranks` holds 16 numbers of 4 bits.
INLINE F16 unsort(F16 v, uint64_t ranks) {
  F16 out;
  for (int i = 0; i < 16; ++i) out[i] = v[ranks >> (4 * i) & 15];
  return out;
}
// Rows become columns: out[i] lane j = in[j] lane i.
INLINE void transpose16(F16 *r) {
  F16 t[16];
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) t[j][i] = r[i][j];
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
