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

// Of x with kXOffset added the bytes are unsigned, and those of W signed; of x as it is they are the other way round.
#if X_UNSIGNED
#define TILE_DOT _tile_dpbusd
#else
#define TILE_DOT _tile_dpbsud
#endif

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
    TILE_DOT(0, 2, 3);
    if (T == 1) continue;
    _tile_loadd(4, w + apart, 64);
    TILE_DOT(1, 2, 4);
  }
  _tile_stored(0, sums, 64);
  if (T > 1) _tile_stored(1, second, 64);
}

// sums[m] lane n += the products of B times 16 rows of x with each of `count` tiles of W, whose columns of x are said.
template <int B>
INLINE void chosen_products(const uint8_t *w, const int64_t *column, int count, const int8_t *x, int64_t x_stride,
                            I16 *sums) {
  if (!count) return;
  _tile_loadd(0, sums, 64);
  if (B > 1) _tile_loadd(1, sums + 16, 64);
  for (int i = 0; i < count; ++i) {
    _tile_loadd(4, w + 1024 * i, 64);
    _tile_loadd(2, x + column[i], x_stride);
    TILE_DOT(0, 2, 4);
    if (B == 1) continue;
    _tile_loadd(3, x + 16 * x_stride + column[i], x_stride);
    TILE_DOT(1, 3, 4);
  }
  _tile_stored(0, sums, 64);
  if (B > 1) _tile_stored(1, sums + 16, 64);
}

// What a row kept of 8 columns, put back among zeros: two steps of 4 columns. Pairs of places say by a table where the
// bytes of either half come from; what has the sign bit there becomes 0.
INLINE void dense_steps(Bytes w, Bytes places, uint8_t *out) {
  const int8_t N = -128;
  alignas(64) static const int8_t from[16][4] = {  // [first + 4 second], where first < second
      {N, N, N, N}, {N, N, N, N}, {N, N, N, N}, {N, N, N, N}, {0, 1, N, N}, {N, N, N, N}, {N, N, N, N}, {N, N, N, N},
      {0, N, 1, N}, {N, 0, 1, N}, {N, N, N, N}, {N, N, N, N}, {0, N, N, 1}, {N, 0, N, 1}, {N, N, 0, 1}, {N, N, N, N}};
  const Bytes table = _mm512_load_si512(from);
  const Bytes lanes = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  Bytes pair = _mm512_maddubs_epi16(_mm512_and_si512(places, splat_bytes(3)), _mm512_set1_epi16(0x0401));
  Bytes low = _mm512_permutexvar_epi32(pair, table);
  Bytes high = _mm512_permutexvar_epi32(_mm512_srli_epi32(pair, 16), table);
  store_bytes(out, _mm512_shuffle_epi8(w, _mm512_add_epi8(low, lanes)));
  store_bytes(out + 64, _mm512_shuffle_epi8(w, _mm512_add_epi8(high, _mm512_add_epi8(lanes, splat_bytes(2)))));
}
