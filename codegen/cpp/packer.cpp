// Packs a [n, k] weight (row-major, contiguous) into the layouts "bitmap" and "sliced"; bitmap.h and sliced.h say what
// they are. Both work on a range of tiles of 16 rows, first to count and then to fill, so that threads share the work.
// Any bit pattern but +0 and -0 is kept. `bits` is 16 or 32; values are only moved, never computed with.
#include <algorithm>
#include <cstdint>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kRows = 16, kChunk = 128;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class U>
uint32_t word_of(const U *w, int64_t count) {  // bit j: w[j] is kept; count <= 32
  constexpr U kMagnitude = static_cast<U>(~U{0}) >> 1;
  uint32_t mask = 0;
  for (int64_t j = 0; j < count; ++j) mask |= static_cast<uint32_t>((w[j] & kMagnitude) != 0) << j;
  return mask;
}

uint32_t fill_groups(uint32_t mask, int n, int m) {  // exactly n bits in every group of m; m divides 32
  for (int g = 0; g < 32; g += m) {
    uint32_t group = (m == 32 ? ~0u : (1u << m) - 1) << g;
    for (uint32_t free = group & ~mask; __builtin_popcount(mask & group) < n; free &= free - 1) mask |= free & -free;
  }
  return mask;
}

// Order: group of 4 rows, word of 32 columns, row. `value` may be null: then only `kept` per group is written.
template <class U>
void bitmap(const U *w, int64_t n, int64_t k, int64_t group0, int64_t group1, int fill_n, int fill_m, int64_t *kept,
            const int64_t *start, uint32_t *mask, U *value) {
  int64_t words = ceil_div(k, 32);
  for (int64_t g = group0; g < group1; ++g) {
    int64_t total = 0;
    U *v = value ? value + start[g] : nullptr;
    for (int64_t c = 0; c < words; ++c) {
      for (int64_t r = 4 * g; r < 4 * g + 4; ++r) {
        int64_t count = std::min<int64_t>(32, k - 32 * c);
        const U *row = w + r * k + 32 * c;
        uint32_t bits = r < n ? word_of(row, count) : 0;
        if (fill_m) bits = fill_groups(bits, fill_n, fill_m);
        total += __builtin_popcount(bits);
        if (!value) continue;
        mask[(g * words + c) * 4 + r - 4 * g] = bits;
        for (; bits; bits &= bits - 1) {
          int j = __builtin_ctz(bits);
          *v++ = r < n && j < count ? row[j] : U{0};
        }
      }
    }
    if (!value) kept[g] = total;
  }
}

// One tile in one chunk: which columns each group of `share` rows uses, most used group first.
template <class U>
struct Sorted {
  uint8_t column[kRows][kChunk];
  int count[kRows], order[kRows], groups;

  Sorted(const U *w, int64_t n, int64_t k, int64_t row0, int64_t k0, int share) : groups(kRows / share) {
    for (int g = 0; g < groups; ++g) {
      uint32_t words[kChunk / 32] = {};
      for (int64_t r = row0 + g * share; r < std::min(n, row0 + (g + 1) * share); ++r)
        for (int64_t j = 0; j < kChunk / 32 && k0 + 32 * j < k; ++j)
          words[j] |= word_of(w + r * k + k0 + 32 * j, std::min<int64_t>(32, k - k0 - 32 * j));
      count[g] = 0;
      order[g] = g;
      for (int j = 0; j < kChunk / 32; ++j)
        for (uint32_t bits = words[j]; bits; bits &= bits - 1)
          column[g][count[g]++] = static_cast<uint8_t>(32 * j + __builtin_ctz(bits));
    }
    std::stable_sort(order, order + groups, [this](int a, int b) { return count[a] > count[b]; });
  }
  // Groups that still have something at step s.
  int active(int s, int per) const {
    int p = 0;
    while (p < groups && count[order[p]] > s * per) ++p;
    return p;
  }
};

template <class U>
void sliced(const U *w, int64_t n, int64_t k, int64_t tile0, int64_t tile1, int share, int64_t *sizes,
            const int64_t *start, U *value, uint8_t *position, uint8_t *lanes, uint8_t *head) {
  constexpr int per = sizeof(U) == 4 ? 1 : 2;
  int64_t chunks = ceil_div(k, kChunk);
  for (int64_t t = tile0; t < tile1; ++t) {
    int64_t values = 0, steps = 0;
    U *v = value ? value + start[2 * t] : nullptr;
    uint8_t *p = position + (value ? start[2 * t] / share : 0), *l = lanes + (value ? start[2 * t + 1] : 0);
    for (int64_t c = 0; c < chunks; ++c) {
      Sorted<U> sorted(w, n, k, t * kRows, c * kChunk, share);
      int most = static_cast<int>(ceil_div(sorted.count[sorted.order[0]], per));
      if (!value) {
        for (int g = 0; g < sorted.groups; ++g) values += ceil_div(sorted.count[g], per) * per * share;
        steps += most;
        continue;
      }
      uint8_t *h = head + (t * chunks + c) * 9;
      std::memset(h, 0, 9);
      h[0] = static_cast<uint8_t>(most);
      for (int g = 0; g < sorted.groups; ++g) {
        for (int i = 0; i < share; ++i) {
          int row = sorted.order[g] * share + i, rank = g * share + i;
          h[1 + row / 2] |= static_cast<uint8_t>(rank << (row % 2 * 4));
        }
      }
      for (int s = 0; s < most; ++s) {
        int active = sorted.active(s, per);
        *l++ = static_cast<uint8_t>(active * share);
        for (int a = 0; a < active; ++a) {
          int g = sorted.order[a];
          for (int u = 0; u < per; ++u) {
            int e = s * per + u;
            *p++ = e < sorted.count[g] ? sorted.column[g][e] : 0;
          }
          for (int i = 0; i < share; ++i) {
            int64_t row = t * kRows + g * share + i;
            for (int u = 0; u < per; ++u) {
              int e = s * per + u;
              *v++ = e < sorted.count[g] && row < n ? w[row * k + c * kChunk + sorted.column[g][e]] : U{0};
            }
          }
        }
      }
    }
    if (!value) sizes[2 * t] = values, sizes[2 * t + 1] = steps;
  }
}

}  // namespace

EXPORT void sparsec_pack_bitmap(const void *w, int bits, int64_t n, int64_t k, int64_t group0, int64_t group1, int fill_n,
                                int fill_m, int64_t *kept, const int64_t *start, uint32_t *mask, void *value) {
  if (bits == 32)
    bitmap(static_cast<const uint32_t *>(w), n, k, group0, group1, fill_n, fill_m, kept, start, mask,
           static_cast<uint32_t *>(value));
  else
    bitmap(static_cast<const uint16_t *>(w), n, k, group0, group1, fill_n, fill_m, kept, start, mask,
           static_cast<uint16_t *>(value));
}

EXPORT void sparsec_pack_sliced(const void *w, int bits, int64_t n, int64_t k, int64_t tile0, int64_t tile1, int share,
                                int64_t *sizes, const int64_t *start, void *value, uint8_t *position, uint8_t *lanes,
                                uint8_t *head) {
  if (bits == 32)
    sliced(static_cast<const uint32_t *>(w), n, k, tile0, tile1, share, sizes, start, static_cast<uint32_t *>(value),
           position, lanes, head);
  else
    sliced(static_cast<const uint16_t *>(w), n, k, tile0, tile1, share, sizes, start, static_cast<uint16_t *>(value),
           position, lanes, head);
}
