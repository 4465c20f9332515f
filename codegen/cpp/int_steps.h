// The layout "steps": 16 rows of W by 4 columns, decoded to 64 bytes that lie as the dot product takes them. Zeros that a
// pattern left out become the code of zero.
// pack: codes (uint8); masks, 64 bits a step (bitmaps only); first code of each tile and one more (int64); scales
// [tile][group][16] (float); zeros alike (uint8; kBits < 8); {the type of the weight, bytes from the zeros of one group
// to the next: 0 where all are the same} (int64).
// Expects kBits, kGroup and kPerStep: 64 no masks, 0 any number of codes in a step, else exactly so many.

// Sums stay in registers only where GCC unrolls before it looks at arrays.
#define UNROLL _Pragma("GCC unroll 16")

constexpr int kQuad = 4;  // steps that are decoded together; packs are padded to it
constexpr int64_t kStepsOfGroup = kGroupColumns / 4;
constexpr int kUnit = 8 / kBits;  // codes in a byte
constexpr bool kAsStored = kPerStep == 64 && kBits == 8 && kByteZero == 128;  // nothing has to be decoded

struct Zeros {
  const uint8_t *at;
  int64_t apart;
  MEMBER Zeros() {}
  MEMBER Zeros(const SparsecCall *call, int64_t tile) {
    const int64_t *info = pack_of<int64_t>(call, 5);
    at = pack_of<uint8_t>(call, 4) + tile * scales_of_row(call->k) * info[1];
    apart = kGroup ? info[1] : 0;
  }
  MEMBER I16 of(int64_t group) const { return kBits == 8 ? splat_i(kByteZero) : load_u8(at + group * apart); }
};

// Reads a tile from its pack.
struct Reader {
  const uint8_t *code;
  const uint64_t *mask;
  Zeros zeros;
  Bytes rest;

  MEMBER Reader() {}
  MEMBER Reader(const SparsecCall *call, int64_t tile) : zeros(call, tile) {
    code = pack_of<uint8_t>(call, 0) + pack_of<int64_t>(call, 2)[tile];
    mask = pack_of<uint64_t>(call, 1) + tile * (columns_of(call->k) / 4);
    rest = splat_bytes(kByteZero);
  }
  MEMBER void enter(int64_t group) {
    if (kBits < 8 && kPerStep < 64) rest = four_times(zeros.of(group));
  }
  MEMBER void next(Bytes *out) {
    const char *ahead = reinterpret_cast<const char *>(code) + kAhead;
    if constexpr (kPerStep == 64) {
      for (int i = 0; i < kQuad / kUnit; ++i) __builtin_prefetch(ahead + 64 * i);
      codes4<kBits>(code, out);
      code += 64 * kQuad / kUnit;
      return;
    }
    // Two streams: the hardware's own prefetch, left alone with the masks, is late where codes are few.
    __builtin_prefetch(reinterpret_cast<const char *>(mask) + kAhead / 2);
    UNROLL for (int i = 0; i < kQuad; ++i) {
      uint64_t bits = *mask++;
      asm("" : "+r"(bits));  // loaded once: loads are what there is most of
      if (i % 2 == 0) __builtin_prefetch(reinterpret_cast<const char *>(code) + kAhead / 2);  // two rarely fill a line
      out[i] = expand64(rest, bits, codes64<kBits>(code));
      code += (kPerStep ? kPerStep : __builtin_popcountll(bits) + kUnit - 1) / kUnit;
    }
  }
};
