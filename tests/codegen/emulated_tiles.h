// Tiles of int8 in plain C++, in the place of the intrinsics, so that a machine without AMX runs what is made for it.
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static thread_local struct {
  unsigned char at[8][16][64];
  bool configured;
  long products;
} emulated;
// Products since this thread was asked last.
extern "C" __attribute__((visibility("default"))) long emulated_products() {
  long count = emulated.products;
  emulated.products = 0;
  return count;
}

// X, W: the types of the bytes of x and of W.
template <class X, class W>
static inline void emulated_product(int to, int x, int w) {
  ++emulated.products;
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      int32_t sum;
      memcpy(&sum, &emulated.at[to][m][4 * n], 4);
      for (int k = 0; k < 64; ++k)
        sum += static_cast<X>(emulated.at[x][m][k]) * static_cast<W>(emulated.at[w][k / 4][4 * n + k % 4]);
      memcpy(&emulated.at[to][m][4 * n], &sum, 4);
    }
  }
}
static inline void emulated_load(int to, const void *from, long stride) {
  for (int r = 0; r < 16; ++r) memcpy(emulated.at[to][r], static_cast<const char *>(from) + r * stride, 64);
  if (!emulated.configured) memset(emulated.at[to], 77, sizeof emulated.at[to]);  // a test would see it
}
static inline void emulated_store(int from, void *to, long stride) {
  for (int r = 0; r < 16; ++r) memcpy(static_cast<char *>(to) + r * stride, emulated.at[from][r], 64);
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#undef _tile_dpbusd
#define _tile_loadconfig(p) (emulated.configured = (p)->palette == 1 && (p)->rows[0] == 16 && (p)->bytes[0] == 64)
#define _tile_release() (emulated.configured = false)
#define _tile_loadd(to, from, stride) emulated_load(to, from, stride)
#define _tile_stored(from, to, stride) emulated_store(from, to, stride)
#define _tile_dpbsud(to, x, w) emulated_product<signed char, unsigned char>(to, x, w)
#define _tile_dpbusd(to, x, w) emulated_product<unsigned char, signed char>(to, x, w)
#define syscall(...) 0
