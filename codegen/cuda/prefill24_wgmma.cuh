// y = act(x W^T + bias) for a 2:4 weight by wgmma.mma_async.sp m64nNk32, or m64nNk64 of 8-bit floats: sm_90a.
// A block makes kBlockN weight rows x kBlockM rows of x; each warpgroup 64 weight rows x all kBlockM. Weight and x are
// read by the tensor cores from shared memory, metadata from registers. A step is 256 bytes of a row of x: four
// products, of which kSelectors share a word of metadata a lane.
// A stage of shared memory, rows of 128 bytes in the 128-byte swizzle: values [kBlockN] (swizzled when packed), x
// [kBlockM] of the first 128 bytes and of the next 128; then metadata, of each warpgroup [word][warp][lane].

constexpr int kWords = 4 / kSelectors;
constexpr int kValues = kBlockN * 128, kHalfX = kBlockM * 128, kMeta = kBlockN * 8 * kWords;
constexpr int kStage = kValues + 2 * kHalfX + kMeta;  // a multiple of 1024, which the swizzle repeats after

DEVICE void load_stage(u32 stage, const u16 *x, i64 x_stride, const char *values, const char *meta, Tile tile, int step,
                       int rows, int m, int k) {
  const i64 run = (i64)step * rows + tile.n;
  copy_run<kValues>(stage, values + run * 128);
  copy_x(stage + kValues, x, x_stride, tile.m, step * 128, m, k);
  copy_x(stage + kValues + kHalfX, x, x_stride, tile.m, step * 128 + 64, m, k);
  copy_run<kMeta>(stage + kValues + 2 * kHalfX, meta + run * (8 * kWords));
}

// The matrix descriptor of rows of 128 bytes: groups of eight rows 1024 bytes apart, 128-byte swizzle (1 in bits 62-63).
DEVICE u64 described(u32 at) { return (u64)((at & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

// rows: weight rows of the pack, a multiple of kBlockN. k is a multiple of 8, rows of x start on 16 bytes.
KERNEL prefill24(const u16 *x, const char *values, const char *meta, const u16 *bias, const float *scale,
                 const float *x_scale, u16 *y, i64 x_stride, i64 y_stride, int m, int n, int k, int rows, int wide) {
  const u32 memory = shared_base();
  const Tile tile = tile_of(block_index(), m, n);
  const Epilogue with{bias, scale, x_scale, n, m};
  const int warp = thread_index() / 32, lane = thread_index() % 32, group = warp / 4;
  const int steps = k ? (k + 127) / 128 : 1;
  float sums[kBlockM / 8][4];  // the first product sets them: zeros would be written while products may be under way
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    if (s < steps) load_stage(memory + s * kStage, x, x_stride, values, meta, tile, s, rows, m, k);
    copy_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_wait<kAhead - 1>();
    gmma_sees_copies();
    sync_block();
    // All warpgroups have waited for the products of step - kStages + kAhead: that stage may be written.
    const int ahead = step + kAhead;
    const u32 stage = memory + step % kStages * kStage;
    u32 e[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      e[i] = load4(stage + kValues + 2 * kHalfX + (group * kWords + i) * 512 + warp % 4 * 128 + lane * 4);
    }
    const u64 a = described(stage + group * 8192), b0 = described(stage + kValues);
    const u64 b1 = described(stage + kValues + kHalfX);
    gmma_fence();
    gmma_sparse<0>(sums, a, b0, e[0], step > 0);  // a product takes 32 bytes of values and 64 of x, counted by 16
    gmma_sparse<1 % kSelectors>(sums, a + 2, b0 + 4, e[1 / kSelectors], 1);
    gmma_sparse<0>(sums, a + 4, b1, e[2 / kSelectors], 1);
    gmma_sparse<1 % kSelectors>(sums, a + 6, b1 + 4, e[3 / kSelectors], 1);
    gmma_commit();
    if (ahead < steps) {
      load_stage(memory + ahead % kStages * kStage, x, x_stride, values, meta, tile, ahead, rows, m, k);
    }
    copy_commit();
    gmma_wait<kStages - kAhead - 1>();
  }
  gmma_end(sums);
  copy_wait<0>();
  sync_block();
  stage_scales(memory, with, tile);
#pragma unroll
  for (int j = 0; j < kBlockM / 8; ++j) put(memory, sums[j], with, tile, group * 64 + warp % 4 * 16, j * 8);
  sync_block();
  write(memory, y, y_stride, tile, m, n, wide);
}
