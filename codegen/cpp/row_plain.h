// Layout "row_plain": the weight as PyTorch stores it, [N, K] without gaps. pack: values.
constexpr int kMostRows = kWide ? 4 : 1;

template <int MB>
INLINE void dot_row(const SparsecCall *call, int64_t row, int64_t next, const Lane *x, int64_t stride, F16 *acc) {
  const Stored *w = pack_of<Stored>(call, 0) + row * call->k;
  int64_t whole = call->k / 32 * 32;
  // Behind the end of this row comes the row that is read next, which may lie anywhere.
  int64_t own = call->k - kAhead / static_cast<int64_t>(sizeof(Stored));
  const Stored *after = pack_of<Stored>(call, 0) + next * call->k - call->k;
  F16 more[MB];  // a second sum each, so that none waits for itself
  for (int r = 0; r < MB; ++r) more[r] = zero16();
  int64_t k = 0;
  for (; k + 64 <= whole; k += 64) {
    auto *ahead = reinterpret_cast<const char *>((k < own ? w : after) + k) + kAhead;
    __builtin_prefetch(ahead);
    __builtin_prefetch(ahead + 32 * sizeof(Stored));
    auto a = load32(w + k), b = load32(w + k + 32);
    for (int r = 0; r < MB; ++r) {
      acc[r] = mac32(acc[r], a, load32(x + r * stride + k));
      more[r] = mac32(more[r], b, load32(x + r * stride + k + 32));
    }
  }
  if (k < whole)
    for (int r = 0; r < MB; ++r) acc[r] = mac32(acc[r], load32(w + k), load32(x + r * stride + k));
  if (whole < call->k) {  // what follows the row is another, or nothing
    alignas(64) Stored tail[32] = {};
    __builtin_memcpy(tail, w + whole, (call->k - whole) * sizeof(Stored));
    for (int r = 0; r < MB; ++r) acc[r] = mac32(acc[r], load32(tail), load32(x + r * stride + whole));
  }
  for (int r = 0; r < MB; ++r) acc[r] = add(acc[r], more[r]);
}
