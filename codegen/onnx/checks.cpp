// Whether tensors are a pack of a layout, so that a kernel that trusts them reads nothing else.
#include "op.h"

namespace {

constexpr int64_t kPastTheEnd = 64;  // bytes that a kernel may read behind the last value

bool is(const OrtSizes &sizes, int type, int64_t least, int64_t most) {
  return sizes.type == type && sizes.count >= least && sizes.count <= most;
}

}  // namespace

// masks as bytes, values, first value of each 4 rows int64 (bitmap.h); gaps, which kernels do not read
const char *wrong_bitmap(const Layer &layer, const OrtSizes *sizes, const void *const *data) {
  int64_t groups = 4 * layer.tiles(), words = (layer.k + 31) / 32 * 4;
  if (!is(sizes[0], kOrtUint8, 4 * groups * words, 4 * groups * words)) return "the masks do not fit n and k";
  if (!is(sizes[2], kOrtInt64, groups + 1, groups + 1)) return "the starts do not fit n";
  auto *mask = static_cast<const uint32_t *>(data[0]);
  auto *start = static_cast<const int64_t *>(data[2]);
  int64_t next = 0;
  for (int64_t g = 0; g < groups; ++g) {
    if (start[g] != next) return "a start is not where the masks say";
    for (int64_t w = 0; w < words; ++w) next += __builtin_popcount(*mask++);
  }
  if (start[groups] != next) return "the last start is not where the masks say";
  if (sizes[1].type != kOrtFloat || sizes[1].count < next + kPastTheEnd / 4) return "there are fewer values than the masks say";
  return nullptr;
}

// values, positions uint8, lanes uint8, heads uint8, {first value, first step} of each tile int64 (sliced.h)
const char *wrong_slices(const Layer &layer, const OrtSizes *sizes, const void *const *data) {
  int64_t tiles = layer.tiles(), slices = tiles * ((layer.k + 127) / 128);
  for (int i = 1; i < 4; ++i)
    if (sizes[i].type != kOrtUint8) return "positions, lanes and heads are no bytes";
  if (sizes[3].count < 9 * slices) return "the heads do not fit n and k";
  if (!is(sizes[4], kOrtInt64, 2 * tiles + 2, 2 * tiles + 2)) return "the starts do not fit n";
  auto *position = static_cast<const uint8_t *>(data[1]), *lanes = static_cast<const uint8_t *>(data[2]);
  auto *head = static_cast<const uint8_t *>(data[3]);
  auto *start = static_cast<const int64_t *>(data[4]);
  int64_t values = 0, steps = 0;
  for (int64_t s = 0; s < slices; ++s, head += 9) {
    int64_t tile = s / (slices / tiles);
    if (s % (slices / tiles) == 0 && (start[2 * tile] != values || start[2 * tile + 1] != steps))
      return "a start is not where the lanes say";
    int seen = 0;
    for (int r = 0; r < 16; ++r) seen |= 1 << (head[1 + r / 2] >> r % 2 * 4 & 15);
    if (head[0] > 128 || seen != 0xffff) return "a head has too many steps, or ranks that are none";
    if (steps + head[0] > sizes[2].count) return "there are fewer lanes than the heads say";
    for (int i = 0; i < head[0]; ++i, values += lanes[steps++])
      if (lanes[steps] < 1 || lanes[steps] > 16) return "a step has no lanes, or more than there are";
  }
  if (start[2 * tiles] != values || start[2 * tiles + 1] != steps) return "the last start is not where the lanes say";
  if (sizes[0].type != kOrtFloat || sizes[0].count < values + kPastTheEnd / 4) return "there are fewer values than the lanes say";
  if (sizes[1].count < values + kPastTheEnd) return "there are fewer positions than the lanes say";
  uint8_t all = 0;
  for (int64_t i = 0; i < values; ++i) all |= position[i];
  return all < 128 ? nullptr : "a position is outside of its 128 columns";
}

// codes uint8, masks as bytes, first byte of each tile int64, scales, zeros uint8, info int64 (int_steps.h)
const char *wrong_steps(const Layer &layer, const OrtSizes *sizes, const void *const *data) {
  int64_t tiles = layer.tiles(), steps = (layer.k + 15) / 16 * 4, bits = layer.op->bits, group = layer.op->group;
  int64_t groups = group ? (layer.k + group - 1) / group : 1;
  bool whole = sizes[1].count == 0;
  if (whole != (layer.op->masked == 0)) return "masks are missing, or none are wanted";
  if (sizes[1].type != kOrtUint8 || (!whole && sizes[1].count != 8 * tiles * steps)) return "the masks do not fit n and k";
  if (!is(sizes[2], kOrtInt64, tiles + 1, tiles + 1)) return "the starts do not fit n";
  if (!is(sizes[3], kOrtFloat, tiles * groups * 16, tiles * groups * 16)) return "the scales do not fit n and k";
  if (!is(sizes[5], kOrtInt64, 2, 2)) return "the last tensor has not two numbers";
  auto *info = static_cast<const int64_t *>(data[5]);
  if (info[1] != 0 && info[1] != 16) return "the zeros are neither one for all nor one a row";
  int64_t zeros = info[1] ? tiles * groups * 16 : 16;
  if (!is(sizes[4], kOrtUint8, zeros, zeros)) return "the zeros do not fit n and k";
  auto *mask = static_cast<const uint64_t *>(data[1]);
  auto *start = static_cast<const int64_t *>(data[2]);
  int64_t next = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    if (start[t] != next) return "a start is not where the masks say";
    for (int64_t s = 0; s < steps; ++s) next += ((whole ? 64 : __builtin_popcountll(*mask++)) * bits + 7) / 8;
  }
  if (start[tiles] != next) return "the last start is not where the masks say";
  if (sizes[0].type != kOrtUint8 || sizes[0].count < next + kPastTheEnd) return "there are fewer codes than the masks say";
  return nullptr;
}
