// Helpers of the operator linear_from_skew, for every device.
#pragma once

#include <array>
#include <cmath>

#include "binding_checks.h"
#include "binding_ops.h"

namespace boft::binding {

// Least magnitude of a scale by which an output is divided to find it as it was before the scale.
// Below, the rounding of the output beside its bias would be too large a part of the result.
constexpr float kLeastScale = 1.0f / 1024;

// Sizes of a layer, with x (..., d), weight (n, d) and skew (m, K, b(b-1)/2), K b = d.
struct LayerShape {
  int64_t rows, d, n, size;

  LayerShape(const char* op, const Tensor& x, const Tensor& weight, const MaybeTensor& scale,
             const MaybeTensor& bias, int64_t features, int64_t size)
      : d(x.dim() > 0 ? x.size(x.dim() - 1) : 0), n(weight.size(0)), size(size) {
    STD_TORCH_CHECK(d > 0 && weight.dim() == 2 && weight.size(1) == d &&
                        weight.scalar_type() == x.scalar_type(),
                    op, ": expected x (..., d) and weight (n, d) of one dtype, and d > 0");
    STD_TORCH_CHECK(features == d, op, ": skew: expected blocks for ", d, " features, got ",
                    features);
    for (const auto* vector : {&scale, &bias})
      STD_TORCH_CHECK(!*vector || ((*vector)->dim() == 1 && (*vector)->size(0) == n), op,
                      ": scale, bias: expected (", n, ",)");
    STD_TORCH_CHECK(!scale || scale->scalar_type() == compute_dtype(x), op,
                    ": scale: expected the dtype that x is computed in");
    STD_TORCH_CHECK(!bias || bias->scalar_type() == x.scalar_type(), op,
                    ": bias: expected the dtype of x");
    rows = x.numel() / d;
  }
  LayerShape(const char* op, const Tensor& x, const Tensor& weight, const Tensor& skew,
             const MaybeTensor& scale, const MaybeTensor& bias)
      : LayerShape(op, x, weight, scale, bias,
                   skew.dim() == 3 ? skew.size(1) * block_size(skew) : 0,
                   skew.dim() == 3 ? block_size(skew) << (skew.size(0) - 1) : 0) {
    STD_TORCH_CHECK(skew.scalar_type() == compute_dtype(x), op,
                    ": skew: expected the dtype that x is computed in");
  }
  // The same from the blocks (m, K, b, b) and the stage (d / size, size, size) of that skew.
  LayerShape(const char* op, const Tensor& x, const Tensor& weight, const Tensor& blocks,
             const Tensor& stage, const MaybeTensor& scale, const MaybeTensor& bias)
      : LayerShape(op, x, weight, scale, bias, blocks.dim() == 4 ? blocks.size(1) * blocks.size(3)
                                                                 : 0,
                   stage.dim() == 3 ? stage.size(2) : 0) {
    STD_TORCH_CHECK(blocks.scalar_type() == compute_dtype(x) &&
                        stage.scalar_type() == compute_dtype(x),
                    op, ": blocks, stage: expected the dtype that x is computed in");
  }

  // A tensor (..., columns) with as many rows as x, as contiguous rows.
  Tensor rows_of(const Tensor& t, int64_t columns) const {
    STD_TORCH_CHECK(t.dim() > 0 && t.size(t.dim() - 1) == columns && t.numel() == rows * columns,
                    "linear_from_skew: expected ", rows, " rows of ", columns);
    return viewed(dense(t), {rows, columns});
  }
  // Rows (rows, n) in the shape of the output for x, and rows (rows, d) in that of x.
  Tensor output_of(const Tensor& x, const Tensor& y) const { return shaped(x, y, n); }
  Tensor input_of(const Tensor& x, const Tensor& x_grad) const { return shaped(x, x_grad, d); }

 private:
  static Tensor shaped(const Tensor& x, const Tensor& t, int64_t columns) {
    if (x.dim() == 2) return t;
    auto sizes = leading_sizes(x, 1);
    sizes.push_back(columns);
    return viewed(t, sizes);
  }
};

// Calls an operator of torch with tensors, for which the stable ABI has no function.
template <size_t N>
Tensor call(const char* name, std::array<StableIValue, N> stack) {
  const auto error = torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, name, " failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x W^T, plus the bias if there is one: just what torch.nn.functional.linear computes for rows.
inline Tensor product(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  using torch::stable::detail::from;
  if (bias) return call<3>("aten::linear", {from(x), from(weight), from(bias)});
  const int64_t strides[] = {1, weight.size(1)};
  return call<2>("aten::mm", {from(x), from(viewed(weight, {weight.size(1), weight.size(0)}, strides))});
}

// x W.
inline Tensor product(const Tensor& x, const Tensor& weight) {
  using torch::stable::detail::from;
  return call<2>("aten::mm", {from(x), from(weight)});
}

}  // namespace boft::binding
