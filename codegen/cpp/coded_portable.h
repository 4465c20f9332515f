// Codes in plain C++, one after the other.

struct I16 {
  int32_t code[16];
};
INLINE F16 mac32(F16 acc, const F32 &w, Columns<float> x) {
  return fma(w.b, load16(x.x + 16), fma(w.a, load16(x.x), acc));
}

template <class T>
struct Lut;
template <>
struct Lut<float> {
  float t[16];
  MEMBER Lut() {}
  MEMBER explicit Lut(const float *levels) { __builtin_memcpy(t, levels, sizeof t); }
  // level i is first + i
  static MEMBER Lut whole(int first) {
    Lut lut;
    for (int i = 0; i < 16; ++i) lut.t[i] = static_cast<float>(first + i);
    return lut;
  }
  static MEMBER Lut ternary() { return whole(-1); }
  MEMBER F16 at(const I16 &i) const {
    float v[16];
    for (int j = 0; j < 16; ++j) v[j] = t[i.code[j]];
    return load16(v);
  }
};

// Code `i` of those that follow each other
template <int BITS>
INLINE int32_t code_at(const Code<BITS> *v, int i) {
  if (BITS == 8) return static_cast<int8_t>(v[i].bits);
  int bits = v[i * BITS / 8].bits;
  if (BITS == 3) bits |= v[i * BITS / 8 + 1].bits << 8;  // codes of 3 bits may begin in one byte and end in the next
  return bits >> (i * BITS % 8) & ((1 << BITS) - 1);
}
template <int BITS>
INLINE I16 codes16(const Code<BITS> *v) {
  I16 out;
  for (int i = 0; i < 16; ++i) out.code[i] = code_at(v, i);
  return out;
}
template <int BITS>
INLINE F16 number(const I16 &codes) {
  float v[16];
  for (int i = 0; i < 16; ++i) v[i] = static_cast<float>(codes.code[i]);
  return load16(v);
}

// Values at the set bits of `mask`; not spread over lanes, see mac32 of plain values.
template <int BITS>
struct KeptCodes {
  uint32_t mask;
  const Code<BITS> *v;
  const Lut<float> *lut;
};
template <int BITS>
INLINE KeptCodes<BITS> expand32(uint32_t mask, const Code<BITS> *v, const Lut<float> &lut) {
  return {mask, v, &lut};
}
template <int BITS>
INLINE F16 mac32(F16 acc, const KeptCodes<BITS> &w, Columns<float> x) {
  float sum[2] = {};
  int i = 0;
  for (uint32_t left = w.mask; left; left &= left - 1, ++i) {
    int32_t code = code_at(w.v, i);
    sum[i & 1] += (BITS == 8 ? static_cast<float>(code) : w.lut->t[code]) * x.x[__builtin_ctz(left)];
  }
  acc.a += V4{sum[0], sum[1], 0.f, 0.f};
  return acc;
}

template <int BITS>
INLINE F32 numbers(const KeptCodes<BITS> &w) {
  float wide[32] = {};
  int i = 0;
  for (uint32_t left = w.mask; left; left &= left - 1, ++i) {
    int32_t code = code_at(w.v, i);
    wide[__builtin_ctz(left)] = BITS == 8 ? static_cast<float>(code) : w.lut->t[code];
  }
  return {load16(wide), load16(wide + 16)};
}

// 128 codes of a dense row (words.h says where each is), of which word(j) are those of columns 32j to 32j + 31.
template <int BITS, class T>
struct Chunk {
  const Code<BITS> *v;
  MEMBER explicit Chunk(const Code<BITS> *codes) : v(codes) {}
  MEMBER F32 word(int j, const Lut<float> &lut) const {
    float out[32];
    for (int i = 0; i < 32; ++i) {
      int32_t code = code_at(v, BITS == 8 || BITS == 3 ? 32 * j + i : 4 * i + j);
      out[i] = BITS == 8 ? static_cast<float>(code) : lut.t[code];
    }
    return {load16(out), load16(out + 16)};
  }
};
