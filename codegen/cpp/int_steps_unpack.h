// What int_unpack.h asks of the layout "steps".

constexpr int64_t kWide = 4 * kQuad;

struct Source : Reader {
  using Reader::Reader;
  // Columns [k, k + kWide) of the rows of a tile, [16][kWide].
  MEMBER void fill(const SparsecCall *call, int64_t tile, int64_t k, float *dense) {
    int64_t group = k / kGroupColumns;
    if (k % kGroupColumns == 0) enter(group);
    Bytes w[kQuad];
    next(w);
    alignas(64) uint8_t code[64 * kQuad];
    for (int i = 0; i < kQuad; ++i) store_bytes(code + 64 * i, w[i]);
    const float *scale = pack_of<float>(call, 3) + (tile * scales_of_row(call->k) + (kGroup ? group : 0)) * kRows;
    const uint8_t *zero = zeros.at + group * zeros.apart;
    for (int r = 0; r < kRows; ++r) {
      int middle = kBits == 8 ? kByteZero : zero[r];
      for (int c = 0; c < kWide; ++c) {
        int byte = code[64 * (c / 4) + 4 * r + c % 4];
        if (kBits == 8 && !kByteZero) byte = static_cast<int8_t>(byte);
        dense[r * kWide + c] = static_cast<float>(byte - middle) * scale[r];
      }
    }
  }
};
