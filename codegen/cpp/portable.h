// Vocabulary in plain C++: 16 lanes are four vectors of 16 bytes, which GCC and Clang have on every machine.

typedef float V4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
struct F16 {
  V4 a, b, c, d;
};

template <class Op>
INLINE F16 each(F16 x, F16 y, Op op) {
  return {op(x.a, y.a), op(x.b, y.b), op(x.c, y.c), op(x.d, y.d)};
}
INLINE F16 splat(float v) { return {V4{} + v, V4{} + v, V4{} + v, V4{} + v}; }
INLINE F16 zero16() { return splat(0.f); }
INLINE F16 add(F16 x, F16 y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
INLINE F16 sub(F16 x, F16 y) { return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d}; }
INLINE F16 mul(F16 x, F16 y) { return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
INLINE F16 div16(F16 x, F16 y) { return {x.a / y.a, x.b / y.b, x.c / y.c, x.d / y.d}; }
INLINE F16 fma(F16 x, F16 y, F16 z) { return {x.a * y.a + z.a, x.b * y.b + z.b, x.c * y.c + z.c, x.d * y.d + z.d}; }
INLINE F16 max16(F16 x, F16 y) {  // y where either is NaN
  return each(x, y, [](V4 p, V4 q) { return p > q ? p : q; });
}
INLINE F16 min16(F16 x, F16 y) {
  return each(x, y, [](V4 p, V4 q) { return p < q ? p : q; });
}
INLINE F16 abs16(F16 x) {
  return each(x, x, [](V4 p, V4) { return reinterpret_cast<V4>(reinterpret_cast<I4>(p) & 0x7fffffff); });
}
INLINE void store16(float *p, F16 v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE F16 load16(const float *p) {
  F16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE F16 load16(const bf16 *p) {
  float v[16];
  for (int i = 0; i < 16; ++i) v[i] = to_float(p[i]);
  return load16(v);
}
INLINE F16 round16(F16 x) {
  float v[16];
  store16(v, x);
  for (int i = 0; i < 16; ++i) v[i] = __builtin_rintf(v[i]);
  return load16(v);
}
// 2^n for whole n in [-127, 128]; 0 and infinity at the ends
INLINE F16 exp2i(F16 n) {
  float v[16];
  store16(v, n);
  for (int i = 0; i < 16; ++i) {
    uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(v[i] == v[i] ? v[i] : 0.f) + 127) << 23;
    __builtin_memcpy(&v[i], &bits, 4);
  }
  return load16(v);
}
template <class T>
INLINE F16 load_n(const T *p, int n) {
  float copy[16] = {};
  for (int i = 0; i < n; ++i) copy[i] = to_float(p[i]);
  return load16(copy);
}
INLINE void store_n(float *p, int n, F16 v) { __builtin_memcpy(p, &v, n * sizeof(float)); }
INLINE void store_n(bf16 *p, int n, F16 v) {
  float copy[16];
  store16(copy, v);
  for (int i = 0; i < n; ++i) p[i] = to_bf16(copy[i]);
}

// ---- 32 columns of x or of a row of W

struct F32 {
  F16 a, b;
};
template <class T>
struct Columns {
  const T *x;
};
template <class T>
struct Kept {
  uint32_t mask;
  const T *v;
};
template <class T>
INLINE Columns<T> load32(const T *p) {
  return {p};
}
// acc lane i += w[2i] x[0] + w[2i+1] x[1]
INLINE F16 mac_pairs(F16 acc, const bf16 *w, const bf16 *x) {
  float even[16], odd[16];
  for (int i = 0; i < 16; ++i) even[i] = to_float(w[2 * i]), odd[i] = to_float(w[2 * i + 1]);
  return fma(load16(odd), splat(to_float(x[1])), fma(load16(even), splat(to_float(x[0])), acc));
}
template <class T>
INLINE Kept<T> expand32(uint32_t mask, const T *v) {
  return {mask, v};
}
// 32 values as floats, in the order of their columns
INLINE F32 numbers(const F32 &v) { return v; }
template <class T>
INLINE F32 numbers(Kept<T> w) {
  float wide[32] = {};
  for (uint32_t left = w.mask; left; left &= left - 1) wide[__builtin_ctz(left)] = to_float(*w.v++);
  return {load16(wide), load16(wide + 16)};
}
// Not spread over lanes: writing 32 places one by one and reading them as vectors would stall.
template <class T>
INLINE F16 mac32(F16 acc, Kept<T> w, Columns<T> x) {
  float even = 0.f, odd = 0.f;
  for (uint32_t left = w.mask; left; left &= left - 1) {
    even += to_float(*w.v++) * to_float(x.x[__builtin_ctz(left)]);
    left &= left - 1;
    if (!left) break;
    odd += to_float(*w.v++) * to_float(x.x[__builtin_ctz(left)]);
  }
  acc.a += V4{even, odd, 0.f, 0.f};
  return acc;
}
template <class T>
INLINE F16 mac32(F16 acc, Columns<T> w, Columns<T> x) {
  return fma(load16(w.x + 16), load16(x.x + 16), fma(load16(w.x), load16(x.x), acc));
}

// out[i] = sum of the 16 lanes of v[i]
INLINE void sums4(const F16 *v, float *out) {
  for (int i = 0; i < 4; ++i) {
    V4 s = (v[i].a + v[i].b) + (v[i].c + v[i].d);
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
    float sum[16];
    store16(sum, acc);
    for (int i = 0; i < lanes; ++i)
      for (int u = 0; u < kPer; ++u) sum[i] += to_float(v[kPer * i + u]) * at(x, p[i / R * kPer + u]);
    return load16(sum);
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
  float in[16], out[16];
  store16(in, v);
  for (int i = 0; i < 16; ++i) out[i] = in[ranks >> (4 * i) & 15];
  return load16(out);
}
// Rows become columns: out[i] lane j = in[j] lane i.
INLINE void transpose16(F16 *r) {
  float in[16][16], out[16][16];
  for (int i = 0; i < 16; ++i) store16(in[i], r[i]);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out[j][i] = in[i][j];
  for (int i = 0; i < 16; ++i) r[i] = load16(out[i]);
}
