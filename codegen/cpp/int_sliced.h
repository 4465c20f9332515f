// The layout "slices": lanes are the 16 rows of a tile, and each row has columns of its own. In each chunk of columns the
// rows are sorted by how many values they keep, so that step s holds the s-th four values of the first lanes[s] rows,
// without gaps. kShare neighbouring rows use the same columns (blocks of kShare x 1) and share their positions; with
// kRun = 4 the four columns of a step are neighbours (blocks of 1 x 4) and share one position.
// pack: codes (uint8, lanes x 4 of each step); positions in the chunk, in runs (uint8); lanes of each step (uint8); for
// each tile and chunk 9 bytes, the number of steps and the rank of each row (16 x 4 bits); for each tile {first byte of
// codes, first position, first step} (int64); scales [tile][group][16] (float); sums of q alike (int32); zeros
// [tile][chunk][16] in the order of the ranks (uint8; kBits < 8); {the type of the weight, bytes from the zeros of one
// chunk to the next} (int64).
// Expects kBits, kGroup, kShare, kRun and kSlice, the columns of a chunk: a group has a whole number of chunks.

#define UNROLL _Pragma("GCC unroll 16")  // see int_steps.h

struct Cursor {
  const uint8_t *code, *position, *lanes, *head, *zero;
  int64_t apart;

  MEMBER Cursor(const SparsecCall *call, int64_t tile) {
    const int64_t *start = pack_of<int64_t>(call, 4) + 3 * tile;
    int64_t first = tile * ceil_div(call->k, kSlice);
    code = pack_of<uint8_t>(call, 0) + start[0];
    position = pack_of<uint8_t>(call, 1) + start[1];
    lanes = pack_of<uint8_t>(call, 2) + start[2];
    head = pack_of<uint8_t>(call, 3) + first * 9;
    apart = pack_of<int64_t>(call, 8)[1];
    zero = pack_of<uint8_t>(call, 7) + first * apart;
  }
  MEMBER uint64_t ranks() const {
    uint64_t r;
    __builtin_memcpy(&r, head + 1, 8);
    return r;
  }
  MEMBER void next_chunk() { head += 9, zero += apart; }
};
