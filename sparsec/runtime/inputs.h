#pragma once
// Rows of x rounded to int8 and back, bit for bit what passes/quantize/inputs.py computes: dense products of layers
// with quantised inputs, and kernels that do not quantise by themselves, are given these.
//
//   s = max|x| / 127 of each row (1 where that is zero), or one number;  q = clamp(round(x / s), -127, 127);  q * s
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <optional>

namespace {

// What a plan says about x. `scale`: the one number of kFixed; for kToken the least that a scale may be (0: any).
// kGiven: the number is an operand of the call.
struct InputRule {
  enum Kind : int64_t { kRaw, kToken, kFixed, kGiven };
  Kind kind = kRaw;
  float scale = 0;

  bool raw() const { return kind == kRaw; }
  // The rule with the operand in it, where there is one.
  InputRule with(const std::optional<at::Tensor> &operand) const {
    if (kind != kGiven) return *this;
    TORCH_CHECK(operand && operand->defined() && operand->numel() == 1 && operand->scalar_type() == at::kFloat,
                "sparsec: the scale of x must be one float32 number");
    return {kFixed, operand->const_data_ptr<float>()[0]};
  }
  // Whether a kernel may be told to do it: nonsense in a scale stays with the plain arithmetic of quantised_rows.
  bool sane() const { return kind != kFixed || (scale > 0 && std::isfinite(scale)); }
  // As SparsecCall.x_scale has it.
  float code() const { return kind == kFixed ? scale : kind == kToken && scale > 0 ? -scale : 0.0f; }
  bool operator==(const InputRule &o) const {
    return kind == o.kind && std::bit_cast<uint32_t>(scale) == std::bit_cast<uint32_t>(o.scale);
  }
};

constexpr float kTop = 127.0f;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds half to even up to 2^22

template <class T>
float token_scale(const T *x, int64_t k, float least) {
  uint32_t top = 0;  // magnitudes order as their bits do, and NaN above all
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < k; ++j) {
    uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(x[j])) & 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  float scale = std::bit_cast<float>(top) / kTop;
  if (least > 0) return scale < least ? least : scale;
  return scale == 0 ? 1.0f : scale;
}

template <class T>
void quantise_row(const T *x, T *y, int64_t k, const InputRule &rule) {
  const float scale = rule.kind == InputRule::kFixed ? rule.scale : token_scale(x, k, rule.scale);
#pragma omp simd
  for (int64_t j = 0; j < k; ++j) {
    float v = static_cast<float>(x[j]) / scale;
    v = v < -kTop ? -kTop : v;  // NaN stays
    v = v > kTop ? kTop : v;
    y[j] = static_cast<T>(((v + kRound) - kRound) * scale);
  }
}

// rows [M, K] with unit inner stride, fp32 or bf16 -> the same, contiguous.
at::Tensor quantised_rows(const at::Tensor &rows, const InputRule &rule) {
  const int64_t m = rows.size(0), k = rows.size(1), stride = rows.stride(0);
  at::Tensor y = at::empty({m, k}, rows.options());
  auto run = [&](auto tag) {
    using T = decltype(tag);
    const T *from = rows.const_data_ptr<T>();
    T *to = y.mutable_data_ptr<T>();
    int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(k, 1));
    at::parallel_for(0, m, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) quantise_row(from + i * stride, to + i * k, k, rule);
    });
  };
  if (rows.scalar_type() == at::kBFloat16) run(c10::BFloat16{});
  else run(float{});
  return y;
}

}  // namespace
