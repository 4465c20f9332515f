// y = act(x W^T + bias) for a 2:4 weight by mma.sp: m16n8k32 on sm_80 and everything after it, m16n8k64 of 8-bit floats
// on sm_89 and sm_120.
// A block makes kBlockN weight rows x kBlockM rows of x; a warp 16 kTilesN x 8 kTilesM of that. A step is 128 bytes of a
// row of x: two products, which share a word of metadata a lane (16 bits) or have one each (8 bits).
// A stage of shared memory: values (fragment order, as packed), metadata, x (swizzled).

constexpr int kValues = kBlockN * 64, kMeta = kBlockN * 16 / kSelectors, kStage = kValues + kMeta + kBlockM * 128;

DEVICE void load_stage(u32 stage, const u16 *x, i64 x_stride, const char *values, const char *meta, Tile tile, int step,
                       int rows, int m, int k) {
  const i64 run = (i64)step * rows + tile.n;
  copy_run<kValues>(stage, values + run * 64);
  copy_run<kMeta>(stage + kValues, meta + run * (16 / kSelectors));
  copy_x(stage + kValues + kMeta, x, x_stride, tile.m, step * 64, m, k);
}

// The words of metadata that serve product HALF and those it shares them with.
template <int HALF> DEVICE void load_meta(u32 (&e)[kTilesN], u32 stage, int warp_n) {
  constexpr int kWords = 2 / kSelectors;
  const int lane = thread_index() % 32;
#pragma unroll
  for (int i = 0; i < kTilesN; ++i) {
    e[i] = load4(stage + kValues + ((warp_n * kTilesN + i) * kWords + HALF / kSelectors) * 128 + lane * 4);
  }
}

template <int HALF>
DEVICE void multiply(float (&sums)[kTilesN][kTilesM][4], const u32 (&meta)[kTilesN], u32 stage, int warp_n, int warp_m) {
  const int lane = thread_index() % 32;
  u32 b[kTilesM][4];
#pragma unroll
  for (int j = 0; j < kTilesM; ++j) {
    const int row = (warp_m * kTilesM + j) * 8 + lane % 8;
    load_matrix4(b[j], stage + kValues + kMeta + row * 128 + (((HALF * 4 + lane / 8) ^ (row & 7)) << 4));
  }
#pragma unroll
  for (int i = 0; i < kTilesN; ++i) {
    u32 a[4];
    load16(a, stage + ((warp_n * kTilesN + i) * 2 + HALF) * 512 + lane * 16);
#pragma unroll
    for (int j = 0; j < kTilesM; ++j) mma_sparse<HALF % kSelectors>(sums[i][j], a, b[j], meta[i]);
  }
}

// rows: weight rows of the pack, a multiple of kBlockN. k is a multiple of 8, rows of x start on 16 bytes.
KERNEL prefill24(const u16 *x, const char *values, const char *meta, const u16 *bias, const float *scale,
                 const float *x_scale, u16 *y, i64 x_stride, i64 y_stride, int m, int n, int k, int rows, int wide) {
  const u32 memory = shared_base();
  const Tile tile = tile_of(block_index(), m, n);
  const Epilogue with{bias, scale, x_scale, n, m};
  const int warp = thread_index() / 32, warp_n = warp % kWarpsN, warp_m = warp / kWarpsN;
  const int steps = (k + 63) / 64;
  float sums[kTilesN][kTilesM][4] = {};
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) load_stage(memory + s * kStage, x, x_stride, values, meta, tile, s, rows, m, k);
    copy_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    sync_block();  // this step's data is there for all warps, and all are done with the step before: its stage is free
    const int ahead = step + kStages - 1;
    if (ahead < steps) {
      load_stage(memory + ahead % kStages * kStage, x, x_stride, values, meta, tile, ahead, rows, m, k);
    }
    copy_commit();
    const u32 stage = memory + step % kStages * kStage;
    u32 e[kTilesN];
    load_meta<0>(e, stage, warp_n);
    multiply<0>(sums, e, stage, warp_n, warp_m);
    if (kSelectors == 1) load_meta<1>(e, stage, warp_n);
    multiply<1>(sums, e, stage, warp_n, warp_m);
  }
  copy_wait<0>();
  sync_block();
  stage_scales(memory, with, tile);
#pragma unroll
  for (int i = 0; i < kTilesN; ++i) {
#pragma unroll
    for (int j = 0; j < kTilesM; ++j) {
      put(memory, sums[i][j], with, tile, (warp_n * kTilesN + i) * 16, (warp_m * kTilesM + j) * 8);
    }
  }
  sync_block();
  write(memory, y, y_stride, tile, m, n, wide);
}
