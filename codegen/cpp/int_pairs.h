// The layout "pairs": of every 4 neighbours of a row 2 are kept (2:4; 1:2 too), so that 16 rows by 8 columns are 64
// codes. Lanes are rows; the 4 bytes of a lane are two pairs. Zeros are not put back among the weights: the same 8
// columns of x are shuffled into the places of what each row kept, which takes half the products of the dense weight.
// x is taken with kXOffset added to it, and what that adds to the sums is taken off by the sums of the weights.
// pack: for each 4 steps of 8 columns their codes (as codes4 reads them; of 8 bits: q itself) and 64 bytes of places,
// of which bits 2s and 2s + 1 are those of step s (uint8, one stream); scales [tile][group][16] (float); sums of q
// alike (int32); zeros alike (uint8; kBits < 8); {the type of the weight, bytes from the zeros of one group to the
// next: 0 where all are the same} (int64).
// Expects kBits, kGroup (a multiple of 32), kPair (tiles that share what is loaded of x) and kTogether (rows of x).

#define UNROLL _Pragma("GCC unroll 16")  // see int_steps.h

constexpr int kQuad = 4;
constexpr int64_t kQuadColumns = 8 * kQuad, kQuadCodes = 64 * kQuad * kBits / 8, kQuadBytes = kQuadCodes + 64;

struct Reader {
  const uint8_t *quad, *zeros;
  int64_t apart;
  Bytes zero;

  MEMBER Reader() {}
  MEMBER Reader(const SparsecCall *call, int64_t tile) {
    quad = pack_of<uint8_t>(call, 0) + tile * (columns_of(call->k) / kQuadColumns) * kQuadBytes;
    apart = pack_of<int64_t>(call, 4)[1];
    zeros = pack_of<uint8_t>(call, 3) + tile * groups_of(call->k) * apart;
  }
  MEMBER void enter(int64_t group) {
    if (kBits < 8) zero = four_times(load_u8(zeros + group * apart));
  }
  // The weights of 4 steps, signed, and the places of all of them.
  MEMBER Bytes next(Bytes *w) {
    for (int64_t i = 0; i < kQuadBytes; i += 64) __builtin_prefetch(reinterpret_cast<const char *>(quad) + kAhead + i);
    if constexpr (kBits == 8) {
      UNROLL for (int i = 0; i < kQuad; ++i) w[i] = load_bytes(quad + 64 * i);
    } else {
      codes4<kBits>(quad, w);
      UNROLL for (int i = 0; i < kQuad; ++i) w[i] = minus(w[i], zero);
    }
    Bytes places = load_bytes(quad + kQuadCodes);
    quad += kQuadBytes;
    return places;
  }
};
