// Whole numbers in plain C++, beside the floats of portable.h.

struct Bytes {
  uint8_t at[64];
};
struct I16 {
  int32_t at[16];
};

constexpr int kByteZero = 128;
constexpr int kXOffset = 0;

template <class Op>
INLINE I16 each_i(Op op) {
  I16 out;
  for (int i = 0; i < 16; ++i) out.at[i] = op(i);
  return out;
}
INLINE I16 zero_i16() { return I16{}; }
INLINE I16 splat_i(int32_t v) {
  return each_i([&](int) { return v; });
}
INLINE I16 load_i16(const int32_t *p) {
  return each_i([&](int i) { return p[i]; });
}
INLINE I16 load_u8(const uint8_t *p) {
  return each_i([&](int i) { return int32_t{p[i]}; });
}
INLINE I16 add_i(const I16 &a, const I16 &b) {
  return each_i([&](int i) { return a.at[i] + b.at[i]; });
}
INLINE I16 sub_i(const I16 &a, const I16 &b) {
  return each_i([&](int i) { return a.at[i] - b.at[i]; });
}
INLINE I16 mul_i(const I16 &a, const I16 &b) {
  return each_i([&](int i) { return a.at[i] * b.at[i]; });
}
INLINE F16 to_floats(const I16 &v) {
  float out[16];
  for (int i = 0; i < 16; ++i) out[i] = static_cast<float>(v.at[i]);
  return load16(out);
}
// Whole numbers of -128 .. 127 to bytes.
INLINE void store_bytes(int8_t *p, const F16 &v) {
  float in[16];
  store16(in, v);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(in[i]);
}

INLINE Bytes load_bytes(const uint8_t *p) {
  Bytes out;
  __builtin_memcpy(&out, p, sizeof out);
  return out;
}
INLINE void store_bytes(uint8_t *p, const Bytes &v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE Bytes splat_bytes(int v) {
  Bytes out;
  __builtin_memset(&out, v, sizeof out);
  return out;
}
// Lane i of 16 numbers of 0 .. 255 to all 4 bytes of lane i.
INLINE Bytes four_times(const I16 &v) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.at[i] = static_cast<uint8_t>(v.at[i / 4]);
  return out;
}

// 4 bytes of x, again and again.
INLINE Bytes four_columns(const int8_t *x) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.at[i] = static_cast<uint8_t>(x[i % 4]);
  return out;
}
// acc lane i += the sum over j < 4 of w[4i + j] x[4i + j]; w holds codes as decoded below, x signed bytes.
template <int B>
INLINE I16 dot(const I16 &acc, const Bytes &w, const Bytes &x) {
  return each_i([&](int i) {
    int32_t sum = acc.at[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum += w.at[j] * static_cast<int8_t>(x.at[j]);
    return sum;
  });
}

// 64 codes of B bits that follow each other.
template <int B>
INLINE Bytes codes64(const uint8_t *p) {
  Bytes out;
  constexpr int kTogether = 8 / B;
  for (int i = 0; i < 64; ++i)
    out.at[i] = static_cast<uint8_t>(p[i / kTogether] >> (B * (i % kTogether)) & ((1 << B) - 1));
  return out;
}

// 4 steps of 64 codes each: those of 8 / B steps lie in the same bytes, the first lowest.
template <int B>
INLINE void codes4(const uint8_t *p, Bytes *out) {
  constexpr int kTogether = 8 / B;
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 64; ++j)
      out[i].at[j] =
          static_cast<uint8_t>(p[64 * (i / kTogether) + j] >> (B * (i % kTogether)) & ((1 << B) - 1));
}

// Codes at the set bits of `mask` in order, `rest` elsewhere.
INLINE Bytes expand64(const Bytes &rest, uint64_t mask, const Bytes &codes) {
  Bytes out = rest;
  for (const uint8_t *code = codes.at; mask; mask &= mask - 1) out.at[__builtin_ctzll(mask)] = *code++;
  return out;
}

// ---- steps of slices: lanes are rows that have columns of their own

// w - zero in the first `lanes` lanes, 0 in the others.
INLINE Bytes centred(const Bytes &w, const Bytes &zero, int lanes) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.at[i] = static_cast<uint8_t>(i < 4 * lanes ? w.at[i] - zero.at[i] : 0);
  return out;
}
// acc lane i += the sum over j < 4 of w[4i + j] x[4i + j], both signed.
INLINE I16 dot_signed(const I16 &acc, const Bytes &x, const Bytes &w) {
  return each_i([&](int i) {
    int32_t sum = acc.at[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum += static_cast<int8_t>(w.at[j]) * static_cast<int8_t>(x.at[j]);
    return sum;
  });
}
INLINE Bytes minus(const Bytes &w, const Bytes &zero) { return centred(w, zero, 16); }
// Lane r of the result is lane rank[r] of v.
INLINE I16 unsort_i(const I16 &v, uint64_t ranks) {
  return each_i([&](int i) { return v.at[ranks >> (4 * i) & 15]; });
}

// The positions of a step; SHARE lanes have the same, and RUN neighbouring columns one.
template <int SHARE, int RUN>
struct XPlaces {
  const uint8_t *at;
  MEMBER explicit XPlaces(const uint8_t *p) : at(p) {}
};
// 128 columns of a row of x; or, where all lanes have the same 4, `wide` rows side by side.
template <int SHARE, int RUN>
struct XTable {
  const int8_t *x;
  MEMBER void load(const int8_t *p) { x = p; }
  MEMBER Bytes at(const XPlaces<SHARE, RUN> &p, int wide) const {
    Bytes out;
    for (int i = 0; i < 64; ++i) {
      int lane = i / 4 / SHARE;
      int run = (SHARE == 16 ? wide : 1) * 4;
      out.at[i] = static_cast<uint8_t>(RUN == 4 ? x[run * p.at[lane] + i % 4] : x[p.at[4 * lane + i % 4]]);
    }
    return out;
  }
};

// ---- pairs: two of every 4 neighbouring columns

// 8 bytes of x, again and again.
INLINE Bytes eight_columns(const int8_t *x) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.at[i] = static_cast<uint8_t>(x[i % 8]);
  return out;
}
// Columns of 0 .. 7 of the 4 bytes of each lane: of step s of the 4 that share `all`, two bits in each byte.
INLINE Bytes places_of(const Bytes &all, int s) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.at[i] = static_cast<uint8_t>((all.at[i] >> (2 * s) & 3) + 2 * (i & 2));
  return out;
}
INLINE Bytes at_places(const Bytes &x, const Bytes &places) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.at[i] = x.at[places.at[i]];
  return out;
}
