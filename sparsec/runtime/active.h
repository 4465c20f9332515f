#pragma once
// What activation sparsity leaves to do: the columns of x that hold a value, or the outputs that somebody reads.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kMostActiveRows = 8;  // rows of x for which columns are skipped: the union of more is everything

// Ascending positions in int32, and how many.
struct Active {
  at::Tensor list;
  int64_t count = 0;

  const int32_t *data() const { return count ? list.const_data_ptr<int32_t>() : nullptr; }
};

template <class T>
int64_t positions(const T *x, int64_t m, int64_t k, int64_t stride, int32_t *out) {
  int64_t count = 0;
  if (m == 1) {
    for (int64_t j = 0; j < k; ++j) out[count] = static_cast<int32_t>(j), count += static_cast<float>(x[j]) != 0.0f;
    return count;
  }
  std::vector<uint8_t> any(k);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < k; ++j) any[j] |= static_cast<float>(x[i * stride + j]) != 0.0f;
  for (int64_t j = 0; j < k; ++j) out[count] = static_cast<int32_t>(j), count += any[j];
  return count;
}

// Columns of rows [M, K] (unit inner stride; fp32, bf16 or bool) in which some row holds no zero; a NaN is no zero.
Active active_columns(const at::Tensor &rows) {
  const int64_t m = rows.size(0), k = rows.size(1);
  Active found{at::empty({k + 1}, rows.options().dtype(at::kInt)), 0};  // one place to write to behind the last
  int32_t *out = found.list.mutable_data_ptr<int32_t>();
  if (rows.scalar_type() == at::kBFloat16)
    found.count = positions(rows.const_data_ptr<c10::BFloat16>(), m, k, rows.stride(0), out);
  else if (rows.scalar_type() == at::kBool)
    found.count = positions(rows.const_data_ptr<bool>(), m, k, rows.stride(0), out);
  else
    found.count = positions(rows.const_data_ptr<float>(), m, k, rows.stride(0), out);
  return found;
}

template <class Bits, class T>
bool finite(const T *x, int64_t m, int64_t k, int64_t stride, Bits infinity) {
  Bits most = 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < k; ++j) {
      Bits bits;
      __builtin_memcpy(&bits, x + i * stride + j, sizeof bits);
      bits &= static_cast<Bits>(~Bits{0}) >> 1;
      most = bits > most ? bits : most;
    }
  return most < infinity;
}

// Whether rows [M, K] (unit inner stride; fp32 or bf16) hold no infinity and no NaN.
bool all_finite(const at::Tensor &rows) {
  const int64_t m = rows.size(0), k = rows.size(1), stride = rows.stride(0);
  if (rows.scalar_type() == at::kBFloat16)
    return finite<uint16_t>(rows.const_data_ptr<c10::BFloat16>(), m, k, stride, 0x7f80);
  return finite<uint32_t>(rows.const_data_ptr<float>(), m, k, stride, 0x7f800000);
}

}  // namespace
