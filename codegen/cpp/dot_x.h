// Rows of x for loops that multiply rows by rows: prepare copies them to aligned rows that are padded with zeros to whole
// chunks, so that no kernel has a tail. Lane is what x is multiplied as: its own type, or float.

INLINE int64_t dot_stride(int64_t k) { return ceil_div(k, kChunk) * kChunk; }

EXPORT int64_t sparsec_scratch(int64_t m, int64_t k) { return m * dot_stride(k) * sizeof(Lane) + 64; }
EXPORT int64_t sparsec_prepare_units(int64_t m, int64_t) { return m; }

template <class T>
INLINE void copy_row(T *to, const T *from, int64_t k) {
  __builtin_memcpy(to, from, k * sizeof(T));
}
INLINE void copy_row(float *to, const bf16 *from, int64_t k) {
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) store16(to + i, load16(from + i));
  for (; i < k; ++i) to[i] = to_float(from[i]);
}

EXPORT void sparsec_prepare(const SparsecCall *call, int64_t begin, int64_t end) {
  int64_t stride = dot_stride(call->k);
  for (int64_t i = begin; i < end; ++i) {
    Lane *row = static_cast<Lane *>(call->scratch) + i * stride;
    copy_row(row, static_cast<const X *>(call->x) + i * call->x_stride, call->k);
    __builtin_memset(row + call->k, 0, (stride - call->k) * sizeof(Lane));
  }
}
