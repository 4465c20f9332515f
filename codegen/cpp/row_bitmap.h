// Layout "row_bitmap": rows of W one after the other, each its masks and then its kept values, where codes of each 32
// columns start in a new byte. pack: those bytes, and where each row begins, in units of 4 bytes (int32).
constexpr int kMostRows = !kWide ? 1 : kGroupColumns ? 2 : 4;
constexpr int64_t kGroupWords = kGroupColumns / 32;

template <int MB>
INLINE void dot_row(const SparsecCall *call, int64_t row, int64_t, const Lane *x, int64_t stride, F16 *acc) {
  int64_t words = ceil_div(call->k, 32), step = kGroupWords ? kGroupWords : words;
  const char *at = pack_of<char>(call, 0) + 4 * static_cast<int64_t>(pack_of<int32_t>(call, 1)[row]);
  auto *mask = reinterpret_cast<const uint32_t *>(at);
  auto *v = reinterpret_cast<const Stored *>(mask + words);
  for (int64_t w = 0, part = 0; w < words; ++part) {
    Group<Lane> values(call, row, part);
    F16 sums[MB];
    for (int r = 0; r < MB; ++r) sums[r] = zero16();
    for (int64_t end = w + step < words ? w + step : words; w < end; ++w) {
      __builtin_prefetch(reinterpret_cast<const char *>(v) + kAhead);
      auto wide = expand32(mask[w], v, values);
      v = after(v, __builtin_popcount(mask[w]));
      for (int r = 0; r < MB; ++r) sums[r] = mac32(sums[r], wide, load32(x + r * stride + 32 * w));
    }
    for (int r = 0; r < MB; ++r) acc[r] = values.joined(acc[r], sums[r]);
  }
}
