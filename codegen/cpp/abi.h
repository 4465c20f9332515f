#pragma once
// The whole interface between sparsec's runtime and a generated kernel. See codegen/spec.py for the meaning.
#include <stdint.h>

struct SparsecCall {
  const void *x;
  int64_t x_stride;
  void *y;
  int64_t y_stride;
  const void *bias;
  const void *const *pack;
  void *scratch;
  int64_t m, n, k;
  int32_t act;
  float x_scale;
  const int32_t *active;
  int64_t active_count;
};
