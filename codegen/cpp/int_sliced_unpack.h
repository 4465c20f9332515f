// What int_unpack.h asks of the layout "slices".

constexpr int64_t kWide = kSlice;

struct Source : Cursor {
  using Cursor::Cursor;
  // Columns [k, k + kWide) of the rows of a tile, [16][kWide].
  MEMBER void fill(const SparsecCall *call, int64_t tile, int64_t k, float *dense) {
    const float *scale = pack_of<float>(call, 5) +
                         (tile * scales_of_row(call->k) + (kGroup ? k / kGroupColumns : 0)) * kRows;
    Bytes middle = kBits == 8 ? splat_bytes(kByteZero) : four_times(load_u8(zero));
    uint64_t order = ranks();
    int row[kRows];
    for (int r = 0; r < kRows; ++r) row[order >> (4 * r) & 15] = r;
    __builtin_memset(dense, 0, kRows * kWide * sizeof(float));
    for (int s = head[0]; s > 0; --s) {
      int count = *lanes++;
      alignas(64) uint8_t w[64];
      store_bytes(w, centred(codes64<kBits>(code), middle, count));
      for (int i = 0; i < 4 * count; ++i) {
        int at = position[kRun == 4 ? i / 4 / kShare : i / 4 / kShare * 4 + i % 4], r = row[i / 4];
        // Added, not stored: padding is a zero at some column, maybe one that holds a value.
        dense[r * kWide + (kRun == 4 ? 4 * at + i % 4 : at)] += static_cast<float>(static_cast<int8_t>(w[i])) * scale[r];
      }
      code += count * kBits / 2;
      position += count / kShare * (4 / kRun);
    }
    next_chunk();
  }
};
