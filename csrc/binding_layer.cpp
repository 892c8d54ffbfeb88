// The operator linear_from_skew: all of a rotated layer in one call, from the skew-symmetric
// parameters to the output, on a CPU, and its gradients. The same could be done in separate calls
// from Python, but for a small layer they take longer than the arithmetic.
#include "binding_layer.h"

namespace boft::binding {
namespace {

// True if any of the numbers is not 0: only then the layer may round differently from torch's.
bool is_rotated(const Tensor& skew) {
  const auto* numbers = static_cast<const float*>(skew.const_data_ptr());
  const int64_t n = skew.numel();
  for (int64_t i = 0; i < n; ++i)
    if (numbers[i] != 0.0f) return true;  // NaN too
  return false;
}

// True if z can be found again from y = scale * (z - bias) + bias, to about the precision of y.
bool is_invertible(const Tensor& scale) {
  const auto* numbers = static_cast<const float*>(scale.const_data_ptr());
  const int64_t n = scale.numel();
  for (int64_t j = 0; j < n; ++j)
    if (!(std::abs(numbers[j]) >= kLeastScale)) return false;
  return true;
}

Tensor rotated_rows(const LayerShape& s, const Tensor& rows, const Tensor& stage) {
  return rotate_cpu(rows, stage, s.size, 1, false);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_from_skew_cpu(
    const Tensor& x, const Tensor& weight, const Tensor& skew_, const MaybeTensor& drop_mask,
    const MaybeTensor& scale, const MaybeTensor& bias, bool save_z, bool fused) {
  const LayerShape s("linear_from_skew", x, weight, skew_, scale, bias);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float,
                  "linear_from_skew: x: expected float32 on a CPU");
  save_z = save_z && scale;
  const Tensor rows = s.rows_of(x, s.d), skew = dense(skew_);
  const auto [blocks, stage] = stage_from_skew_cpu(skew, drop_mask);
  const bool rotated = is_rotated(skew);
  if (fused && rotated) {
    auto [y, z] = rotated_linear_cpu(rows, weight, stage, scale, bias, true, save_z);
    return {s.output_of(x, y), z, blocks, stage};
  }
  // Of the identity torch's own sum is to come out, whose product has the bias in it. Otherwise the
  // bias goes in with the scale, which saves a pass.
  const auto center = rotated && scale && !save_z ? std::nullopt : bias;
  const Tensor z = product(rotated ? rotated_rows(s, rows, stage) : rows, weight, center);
  Tensor y = save_z ? new_like(z) : z;
  if (scale) scale_into(z, *scale, center, bias, y);
  return {s.output_of(x, y), save_z ? z : new_tensor(z, {0, s.n}), blocks, stage};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_from_skew_backward_cpu(
    const Tensor& grad_, const Tensor& x, const Tensor& weight, const Tensor& blocks,
    const Tensor& stage, const MaybeTensor& drop_mask, const MaybeTensor& scale,
    const MaybeTensor& bias, const MaybeTensor& output, bool scaled, int64_t splits, bool fused) {
  const LayerShape s("linear_from_skew_backward", x, weight, blocks, stage, scale, bias);
  STD_TORCH_CHECK(splits == 1, "linear_from_skew_backward: splits: expected 1 on a CPU");
  STD_TORCH_CHECK(!output || scale,
                  "linear_from_skew_backward: output: expected none without a scale");
  const Tensor grad = s.rows_of(grad_, s.n), rows = s.rows_of(x, s.d);
  auto z = output ? MaybeTensor(s.rows_of(*output, s.n)) : std::nullopt;
  if (z && scaled && !is_invertible(*scale)) {
    z = product(rotated_rows(s, rows, stage), weight, bias);
    scaled = false;
  }
  Tensor x_grad = rows, gram = rows, scale_grad = rows, bias_grad = rows;
  if (fused) {
    std::tie(x_grad, gram, scale_grad, bias_grad) =
        rotated_linear_backward_cpu(grad, rows, weight, stage, scale, bias, z, 1, true);
  } else {
    Tensor z_grad = grad;
    if (z) {
      std::tie(z_grad, scale_grad, bias_grad) = scale_backward_cpu(grad, *z, *scale, bias);
    } else {
      scale_grad = new_tensor(rows, {0});
      bias_grad = new_tensor(rows, {0});
      if (scale) {
        z_grad = new_like(grad);
        scale_into(grad, *scale, std::nullopt, std::nullopt, z_grad);
      }
    }
    std::tie(x_grad, gram) = rotate_backward_cpu(product(z_grad, weight), rows, stage, s.size, 1,
                                                 false, 1);
  }
  if (z && scaled) {
    auto* sums = static_cast<float*>(scale_grad.mutable_data_ptr());
    const auto* divisors = static_cast<const float*>(scale->const_data_ptr());
    for (int64_t j = 0; j < s.n; ++j) sums[j] /= divisors[j];
  }
  return {s.input_of(x, x_grad), stage_from_skew_backward_cpu(blocks, drop_mask, gram), scale_grad,
          bias_grad};
}

}  // namespace boft::binding
