// Weights that are stored as the numbers they are: what a layout asks about values has empty answers here. coded.h
// gives the same words for codes and scales.

constexpr int64_t kGroupColumns = 0;  // columns of a row that share a scale; 0: all of them

INLINE int64_t part_of(int64_t) { return 0; }  // the group of a column

// What a group of a row needs to turn what is stored into numbers; and how its sum joins that of the row.
template <class T>
struct Group {
  MEMBER Group() {}
  MEMBER Group(const SparsecCall *, int64_t, int64_t) {}
  MEMBER F16 joined(F16 sum, F16 part) const { return add(sum, part); }
};
INLINE auto expand32(uint32_t mask, const Stored *v, const Group<Lane> &) { return expand32(mask, v); }
// 16 values that follow each other, as they are in the weight.
INLINE F16 values16(const Stored *v, const Group<float> &) { return load16(v); }
// Where the next values are after `n` of them that are read together.
INLINE const Stored *after(const Stored *v, int64_t n) { return v + n; }

constexpr int kPerStep = sizeof(Stored) == 4 ? 1 : 2;  // values of a row in a step of the layout "sliced"
constexpr int kStarts = 2, kPositions = 0;

// The layout "sliced" has rows in lanes: the sums of 16 rows in one chunk, and values that were spilled in sorted order.
INLINE F16 joined_rows(const SparsecCall *, int64_t, int64_t, F16 sum, F16 part) { return add(sum, part); }
INLINE void scale_sorted(const SparsecCall *, int64_t, int64_t, uint64_t, float *, int64_t) {}

template <class T>
INLINE void write_outliers(const SparsecCall *, int64_t, T *) {}
INLINE void add_outliers(const SparsecCall *, int64_t, int, int64_t, F16 *) {}
template <int NV>
INLINE void add_outliers_transposed(const SparsecCall *, int64_t, const float *, float *) {}
