"""The C++ text of the epilogue: bias and activation on 16 outputs at a time, the same on every ISA.

It is written on the vocabulary of the ISA headers (``F16`` is 16 floats). ``act`` of the call is the position in
``sparsec.codegen.spec.ACTS``. Worst error against torch in fp32 is about 1e-6 of the largest magnitude involved.

exp: x = n ln2 + r with |r| <= ln2/2, a degree-6 polynomial in r, scaled by 2^n through the exponent bits.
erfc (z >= 0): exp(-z^2) t P(t), t = 1 / (1 + 0.38 z), the form of Abramowitz and Stegun 7.1.26; P of degree 8. Both
polynomials are our own weighted least-squares fits to the relative error (3e-9 and 2e-8 before rounding to fp32).
"""

from __future__ import annotations

TEXT = """
template <int N>
INLINE F16 horner(F16 x, const float (&c)[N]) {
  F16 y = splat(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) y = fma(y, x, splat(c[i]));
  return y;
}

// exp(x): 0 below -87.3, infinity above 88.7, NaN stays NaN.
INLINE F16 exp16(F16 x) {
  static const float c[] = {1.f, 1.f, 0.4999999403953552f, 0.1666652113199234f,
                            0.04166838899254799f, 0.0083687175065279f, 0.0013814596459269524f};
  x = max16(splat(-88.f), min16(splat(89.f), x));
  F16 n = round16(mul(x, splat(1.44269504088896341f)));
  F16 r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  return mul(horner(r, c), exp2i(n));
}

// x / (1 + exp(-t)): silu for t = x, tanh-gelu for t = 2u.
INLINE F16 swish(F16 x, F16 t) { return div16(x, add(splat(1.f), exp16(sub(zero16(), t)))); }

// x Phi(x) = max(x, 0) - |x|/2 erfc(|x| / sqrt 2), which has no cancellation for x < 0.
INLINE F16 gelu_erf(F16 x) {
  static const float c[] = {0.2144118696451187f, 0.2139049917459488f, 0.204002246260643f, 0.13829860091209412f,
                            0.23080508410930634f, -0.16253232955932617f, 0.36475715041160583f, -0.2626967430114746f,
                            0.05904914438724518f};
  F16 a = min16(splat(1e4f), abs16(x));
  F16 t = div16(splat(1.f), fma(a, splat(0.38f * 0.70710678118654752f), splat(1.f)));
  F16 e = mul(exp16(mul(mul(a, a), splat(-0.5f))), mul(t, horner(t, c)));
  return fma(mul(a, splat(-0.5f)), e, max16(zero16(), x));
}

INLINE F16 gelu_tanh(F16 x) {
  F16 u = fma(mul(mul(x, x), x), splat(0.044715f), x);
  return swish(x, mul(u, splat(2.f * 0.79788456080286536f)));
}

// sums[i] = act(sums[i])
INLINE void activate(int32_t act, int rows, F16 *sums) {
  switch (act) {
    case 1: for (int i = 0; i < rows; ++i) sums[i] = max16(zero16(), sums[i]); break;
    case 2: for (int i = 0; i < rows; ++i) sums[i] = gelu_erf(sums[i]); break;
    case 3: for (int i = 0; i < rows; ++i) sums[i] = gelu_tanh(sums[i]); break;
    case 4: for (int i = 0; i < rows; ++i) sums[i] = swish(sums[i], sums[i]); break;
    default: break;
  }
}

// y[row + i, n0 .. n0 + count) = act(sums[i] + bias) for each of `rows` rows, count <= 16. Not inlined: the kernels'
// loops need the registers.
template <class T>
__attribute__((noinline)) void finish(const SparsecCall *call, int64_t row, int rows, int64_t n0, F16 *sums) {
  int64_t left = call->n - n0;
  int count = left < 16 ? static_cast<int>(left) : 16;
  if (call->bias) {
    F16 bias = load_n(static_cast<const T *>(call->bias) + n0, count);
    for (int i = 0; i < rows; ++i) sums[i] = add(sums[i], bias);
  }
  activate(call->act, rows, sums);
  T *y = static_cast<T *>(call->y) + row * call->y_stride + n0;
  for (int i = 0; i < rows; ++i) store_n(y + i * call->y_stride, count, sums[i]);
}
"""
