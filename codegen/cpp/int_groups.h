// Columns and groups of whole numbers, as prepare, loops and layouts count them. Expects kXColumns and kGroup.

constexpr int64_t kSegment = 65536;  // columns whose sum of products fits int32 with room to spare
constexpr int64_t kGroupColumns = kGroup ? kGroup : kSegment;

INLINE int64_t columns_of(int64_t k) { return ceil_div(k, kXColumns) * kXColumns; }
INLINE int64_t groups_of(int64_t k) { return ceil_div(k, kGroupColumns); }
// Scales and zeros that a row of W has in its pack.
INLINE int64_t scales_of_row(int64_t k) { return kGroup ? groups_of(k) : 1; }
