// Activations as whole numbers. prepare turns each row of x into q = round(x / s) of -127 .. 127 with s = max|x| / 127
// (or the scale of the call, or at least its negative), to nearest even and by a true division, as plain PyTorch does.
// A row that holds a NaN, or an infinity where s comes from it, gets the scale NaN, so that all its outputs are NaN.
// Scratch: rows of x in blocks of up to kSide rows, of each block first 4 columns of every row, then the next 4; rows
// as they were, quantised (only where kSide > 1); a scale for each row; and for each row the sums of q over the columns
// of each group (only where kSums).
// Expects X (type of x), kSide, kSums, kXFlip, and int_groups.h; columns are padded with zeros to kXColumns.

// Rows of x side by side: kSide, then the powers of two that are left.
INLINE int64_t block_rows(int64_t left) {
  int64_t rows = kSide;
  while (rows > left) rows /= 2;
  return rows;
}

struct Activations {
  int64_t columns, groups;
  int8_t *x, *flat;
  float *scale;
  int32_t *sum;

  MEMBER explicit Activations(const SparsecCall *call) {
    columns = columns_of(call->k), groups = groups_of(call->k);
    x = static_cast<int8_t *>(call->scratch);
    flat = x + call->m * columns;
    int64_t end = (kSide > 1 ? 2 : 1) * call->m * columns;
    scale = reinterpret_cast<float *>(x + ceil_div(end, 64) * 64);
    sum = reinterpret_cast<int32_t *>(scale + call->m);
  }
};

EXPORT int64_t sparsec_scratch(int64_t m, int64_t k) {
  return (kSide > 1 ? 2 : 1) * m * columns_of(k) + 4 * m * (1 + groups_of(k)) + 192;
}
EXPORT int64_t sparsec_prepare_units(int64_t m, int64_t) { return ceil_div(m, kSide); }

INLINE float total(F16 v) {
  alignas(64) float lane[16], sum = 0;
  store16(lane, v);
  for (int i = 0; i < 16; ++i) sum += lane[i];
  return sum;
}
INLINE int lanes_at(int64_t c, int64_t k) { return k - c < 16 ? static_cast<int>(k - c) : 16; }

// {the scale to divide by, the scale of the results}
struct Scales {
  float divisor, result;
};
INLINE Scales scales_of(const X *x, int64_t k, float given) {
  F16 most = zero16(), bad = zero16();  // max16 and min16 give their second argument where either is a NaN
  for (int64_t c = 0; c < k; c += 16) {
    F16 v = abs16(load_n(x + c, lanes_at(c, k)));
    most = max16(v, most);
    bad = fma(given > 0 ? min16(splat(1.f), v) : v, zero16(), bad);
  }
  if (given > 0) return {given, given + total(bad)};
  alignas(64) float lane[16], top = 0;
  store16(lane, most);
  for (int i = 0; i < 16; ++i) top = lane[i] > top ? lane[i] : top;
  float s = top / 127.f;
  if (given < 0) s = s < -given ? -given : s;
  else if (s == 0) s = 1;
  return {s, s + total(bad)};
}

INLINE void quantise_row(const SparsecCall *call, const Activations &to, int64_t row, int8_t *out) {
  const X *x = static_cast<const X *>(call->x) + row * call->x_stride;
  Scales scales = scales_of(x, call->k, call->x_scale);
  to.scale[row] = scales.result;
  F16 divisor = splat(scales.divisor), sum = zero16();
  int32_t *sums = to.sum + row * to.groups;
  for (int64_t c = 0; c < call->k; c += 16) {
    F16 q = round16(div16(load_n(x + c, lanes_at(c, call->k)), divisor));
    q = max16(min16(q, splat(127.f)), splat(-127.f));
    int8_t bytes[16];
    store_bytes(bytes, q);
    if (kXFlip)
      for (int i = 0; i < 16; ++i) bytes[i] ^= -128;
    __builtin_memcpy(out + c, bytes, 16);
    if (!kSums) continue;
    sum = add(sum, q);  // exact: a segment has at most 2^16 columns
    if ((c + 16) % kGroupColumns && c + 16 < call->k) continue;
    *sums++ = static_cast<int32_t>(total(sum));
    sum = zero16();
  }
  int64_t written = ceil_div(call->k, 16) * 16;
  __builtin_memset(out + written, kXFlip ? 128 : 0, to.columns - written);
}

EXPORT void sparsec_prepare(const SparsecCall *call, int64_t begin, int64_t end) {
  Activations to(call);
  int64_t last = end * kSide < call->m ? end * kSide : call->m;
  for (int64_t row = begin * kSide, rows; row < last; row += rows) {
    rows = block_rows(last - row);
    int8_t *out = to.x + row * to.columns, *flat = rows == 1 ? out : to.flat + row * to.columns;
    for (int64_t i = 0; i < rows; ++i) quantise_row(call, to, row + i, flat + i * to.columns);
    if (rows == 1) continue;
    for (int64_t c = 0; c < to.columns; c += 64) {  // 4 columns are moved as the float they are not
      F16 r[16];
      for (int64_t i = 0; i < 16; ++i)
        r[i] = i < rows ? load16(reinterpret_cast<const float *>(flat + i * to.columns + c)) : zero16();
      transpose16(r);
      for (int64_t j = 0; j < 16 && c + 4 * j < to.columns; ++j)
        store_n(reinterpret_cast<float *>(out + (c + 4 * j) * rows), static_cast<int>(rows), r[j]);
    }
  }
}
