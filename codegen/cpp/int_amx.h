// Tiles of int8 (AMX), beside the words of int_avx512.h. A tile is 16 rows of 64 bytes; 16 steps of W, as they are
// decoded, are the second factor of a product as it has to lie.
#include <sys/syscall.h>
#include <unistd.h>

// Linux gives a process the registers when it asks once; where it does not, products are those of vectors.
INLINE bool may_use_tiles() {
  static const bool may = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return may;
}

// While it lives, the thread's tiles are 16 rows of 64 bytes.
struct Tiling {
  Tiling() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16};
    } config;
    if (may_use_tiles()) _tile_loadconfig(&config);
  }
  ~Tiling() {
    if (may_use_tiles()) _tile_release();
  }
};

// sums[t][m] lane n += the products of row m of x and row n of tile t of W, over `steps` steps. T tiles of W are
// `apart` bytes from each other, rows of x x_stride; sums of a tile are sums_apart bytes from those of the next.
template <int T>
INLINE void tile_products(const uint8_t *w, int64_t apart, const int8_t *x, int64_t x_stride, int64_t steps, I16 *sums,
                          int64_t sums_apart) {
  char *second = reinterpret_cast<char *>(sums) + (T - 1) * sums_apart;
  _tile_loadd(0, sums, 64);
  if (T > 1) _tile_loadd(1, second, 64);
  for (int64_t s = 0; s < steps; s += 16, w += 16 * 64, x += 64) {
    _tile_loadd(2, x, x_stride);
    _tile_loadd(3, w, 64);
    _tile_dpbsud(0, 2, 3);
    if (T == 1) continue;
    _tile_loadd(4, w + apart, 64);
    _tile_dpbsud(1, 2, 4);
  }
  _tile_stored(0, sums, 64);
  if (T > 1) _tile_stored(1, second, 64);
}
