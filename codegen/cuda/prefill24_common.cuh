// What both prefill kernels do around their products: which tile a block has, and how sums become y.
// Sums lie as tensor cores leave them: tile [16 weight rows x 8 rows of x], lane 4 g + t has, of row g and row g + 8,
// columns 2 t and 2 t + 1.
// x and K are counted in units of two bytes: one 16-bit float, or two of 8 bits. With kScaled, a weight row and a row
// of x have an fp32 scale each.

struct Tile {
  int n, m;  // first weight row, first row of x
};

// Blocks run in order, so eight tiles of weight rows beside each other are taken for all of x before the next eight:
// what they share stays in L2.
DEVICE Tile tile_of(int block, int m, int n) {
  const int across = (n + kBlockN - 1) / kBlockN, down = (m + kBlockM - 1) / kBlockM;
  const int group = block / (8 * down), inside = block % (8 * down);
  const int first = 8 * group, width = across - first < 8 ? across - first : 8;
  return {(first + inside % width) * kBlockN, inside / width * kBlockM};
}

// Rows of x, 128 bytes of K each, into shared memory: chunk c of row r lies at chunk c ^ (r % 8), so that eight rows of
// one chunk are in different banks. Beyond m and k there are zeros.
DEVICE void copy_x(u32 to, const u16 *x, i64 stride, int first_row, int first_column, int m, int k) {
#pragma unroll
  for (int i = 0; i < kBlockM * 8 / kThreads; ++i) {
    const int at = i * kThreads + thread_index(), row = at / 8, chunk = at % 8;
    const int column = first_column + chunk * 8;
    const bool inside = first_row + row < m && column < k;
    const u16 *from = inside ? x + (first_row + row) * stride + column : x;
    copy16(to + row * 128 + ((chunk ^ (row & 7)) << 4), from, inside ? 16 : 0);
  }
}

// `bytes` that lie in the pack as they shall lie in shared memory.
template <int BYTES> DEVICE void copy_run(u32 to, const char *from) {
#pragma unroll
  for (int i = 0; i < BYTES; i += kThreads * 16) {
    const int at = i + thread_index() * 16;
    if (BYTES % (kThreads * 16) == 0 || at < BYTES) copy16(to + at, from + at, 16);
  }
}

DEVICE float activate(float y) {
  if (kAct == 1) return y < 0.f ? 0.f : y;  // NaN has to stay NaN
  if (kAct == 2) return 0.5f * y * (1.f + erff(y * 0.7071067811865476f));
  if (kAct == 3) return y / (1.f + expf(-1.5957691216057308f * (y + 0.044715f * y * y * y)));
  if (kAct == 4) return y / (1.f + expf(-y));
  return y;
}

constexpr int kPitch = (kBlockN + 8) * 2;  // bytes of a row of y in shared memory; 8 more, against bank conflicts

// What sums become y with. n, m: weight rows and rows of x; beyond them nothing is read.
struct Epilogue {
  const u16 *bias;
  const float *scale, *x_scale;
  int n, m;
};

// Scales of the block's rows into shared memory behind y, of weight rows and then of rows of x: read from global memory
// tile by tile, they would have all sums wait beside them in registers, and ptxas spills.
constexpr int kScales = kBlockM * kPitch;
DEVICE void stage_scales(u32 to, const Epilogue &with, Tile tile) {
  if (!kScaled) return;
  for (int i = thread_index(); i < kBlockN + kBlockM; i += kThreads) {
    const bool of_x = i >= kBlockN;
    const int row = of_x ? tile.m + i - kBlockN : tile.n + i;
    store_float(to + kScales + i * 4, row < (of_x ? with.m : with.n) ? (of_x ? with.x_scale : with.scale)[row] : 0.f);
  }
  sync_block();
}

// One tile of sums into shared memory as y[row of x][weight row]; n, m: place of the tile in the block.
DEVICE void put(u32 to, const float (&sums)[4], const Epilogue &with, Tile tile, int n, int m) {
  const int g = thread_index() % 32 / 4, t = thread_index() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = n + g + 8 * half;
    const bool inside = tile.n + column < with.n;
    const float b = with.bias && inside ? widen(with.bias[tile.n + column]) : 0.f;
    const float scale = kScaled ? load_float(to + kScales + column * 4) : 1.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = m + 2 * t + i;
      float y = sums[2 * half + i];
      if (kScaled) y = y * scale * load_float(to + kScales + (kBlockN + row) * 4);
      store2(to + row * kPitch + column * 2, narrow(activate(y + b)));
    }
  }
}

// The block's y from shared memory to global. wide: rows of y start on 16 bytes and n is a multiple of 8.
DEVICE void write(u32 from, u16 *y, i64 stride, Tile tile, int m, int n, int wide) {
  constexpr int kChunks = kBlockN / 8;
  for (int at = thread_index(); at < kBlockM * kChunks; at += kThreads) {
    const int row = at / kChunks, column = at % kChunks * 8;
    if (tile.m + row >= m || tile.n + column >= n) continue;
    u16 *to = y + (tile.m + row) * stride + tile.n + column;
    const u32 source = from + row * kPitch + column * 2;
    if (wide) {
      u32 r[4];
      load16(r, source);
      *reinterpret_cast<uint4 *>(to) = make_uint4(r[0], r[1], r[2], r[3]);
    } else {
      for (int i = 0; i < 8 && tile.n + column + i < n; ++i) to[i] = load2(source + 2 * i);
    }
  }
}
