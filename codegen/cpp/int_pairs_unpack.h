// What int_unpack.h asks of the layout "pairs".

constexpr int64_t kWide = kQuadColumns;

struct Source : Reader {
  using Reader::Reader;
  // Columns [k, k + kWide) of the rows of a tile, [16][kWide].
  MEMBER void fill(const SparsecCall *call, int64_t tile, int64_t k, float *dense) {
    int64_t group = k / kGroupColumns;
    if (k % kGroupColumns == 0) enter(group);
    const float *scale = pack_of<float>(call, 1) + (tile * scales_of_row(call->k) + (kGroup ? group : 0)) * kRows;
    Bytes w[kQuad];
    alignas(64) uint8_t places[64], q[64];
    store_bytes(places, next(w));
    __builtin_memset(dense, 0, kRows * kWide * sizeof(float));
    for (int i = 0; i < kQuad; ++i) {
      store_bytes(q, w[i]);
      for (int at = 0; at < 64; ++at) {
        int r = at / 4, pair = at / 2 % 2, column = 8 * i + 4 * pair + (places[at] >> (2 * i) & 3);
        dense[r * kWide + column] = static_cast<float>(static_cast<int8_t>(q[at])) * scale[r];
      }
    }
  }
};
