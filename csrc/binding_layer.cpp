// The operator linear_from_skew on a CPU, in float32. The products are torch's own, or fused with
// the rotation (binding_linear.cpp).
#include <cmath>

#include "binding_layer.h"
#include "binding_cpu.h"

extern "C" {
// Declared in torch's generated headers, which differ from version to version. torch keeps them for
// the libraries that it compiles ahead.
AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b);
AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle bias,
                                        AtenTensorHandle a, AtenTensorHandle b, double beta,
                                        double alpha);
}

namespace boft::binding {
namespace {

// Least magnitude of a scale by which an output is divided to find it as it was before the scale.
// Below, the rounding of the output beside its bias would be too large a part of the result.
constexpr float kLeastScale = 1.0f / 1024;

const float* numbers(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// True if any of the numbers is not 0: only then the layer may round differently from torch's.
bool is_rotated(const Tensor& skew) {
  const float *begin = numbers(skew), *end = begin + skew.numel();
  return std::any_of(begin, end, [](float q) { return q != 0.0f; });  // NaN too
}

// True if z can be found again from y = scale * (z - bias) + bias, to about the precision of y.
bool is_invertible(const Tensor& scale) {
  const float *begin = numbers(scale), *end = begin + scale.numel();
  return std::all_of(begin, end, [](float s) { return std::abs(s) >= kLeastScale; });
}

// The scale itself, of which `scale` is the offset from `base`.
MaybeTensor effective(const MaybeTensor& scale, int64_t base) {
  if (!scale || base == 0) return scale;
  const Tensor result = new_like(*scale);
  auto* to = static_cast<float*>(result.mutable_data_ptr());
  for (int64_t j = 0; j < scale->size(0); ++j) to[j] = float(base) + numbers(*scale)[j];
  return result;
}

// The steps of a layer, divided among torch's threads.
struct Cpu {
  static constexpr auto dtype = boft::DType::F32;

  void make_stage(const Butterfly& r, const void* skew, const bool* drop, void* blocks,
                  void* stages) const {
    binding::make_stage(r, skew, drop, blocks, stages, dtype);
  }
  void make_stage_backward(const Butterfly& r, const void* blocks, const bool* drop,
                           const void* partials, void* blocks_grad, void* skew_grad,
                           int64_t) const {
    binding::make_stage_backward(r, blocks, drop, partials, blocks_grad, skew_grad, dtype);
  }
  void rotate(const void* x, const void* stage, void* y, const LayerShape& s) const {
    rotate_rows(x, stage, nullptr, y, s.rows, s.d, {s.size(), s.size(), 1}, dtype);
  }
  void rotate_backward(const void* grad, const void* x, const void* stage, void* x_grad,
                       void* partials, const LayerShape& s, int64_t) const {
    // the kernel takes the matrices as it applies them
    const int64_t size = s.size();
    std::vector<float> matrices(size_t(s.d * size));
    const float* from = static_cast<const float*>(stage);
    for (int64_t g = 0; g < s.d; g += size)
      for (int64_t i = 0; i < size; ++i)
        for (int64_t j = 0; j < size; ++j)
          matrices[size_t((g + j) * size + i)] = from[(g + i) * size + j];
    rotate_rows_backward(grad, x, matrices.data(), x_grad, partials, s.rows, s.d, {size, size, 1},
                         false, dtype);
  }
  void multiply(Tensor& out, const Tensor& a, const Tensor& b, const MaybeTensor& bias) const {
    if (bias) {
      STABLE_TORCH_ERROR_CODE_CHECK(
          aoti_torch_cpu_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1, 1));
    } else {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
    }
  }
  void scale(const void* x, const Tensor& scale, const MaybeTensor& center, const MaybeTensor& bias,
             void* y, int64_t rows, int64_t n) const {
    std::vector<float> shift(size_t(n), 0.0f);  // exactly 0 where the scale is 1 and bias is center
    for (int64_t j = 0; bias && j < n; ++j)
      shift[size_t(j)] =
          numbers(*bias)[j] - (center ? numbers(scale)[j] * numbers(*center)[j] : 0.0f);
    scale_rows(x, numbers(scale), shift.data(), y, rows, n, dtype);
  }
  int64_t scale_partials(int64_t, int64_t) const { return 0; }
  void scale_backward(const void* grad, const void* z, const Tensor& scale,
                      const MaybeTensor& center, void* z_grad, void*, void* scale_grad,
                      void* bias_grad, int64_t rows, int64_t n) const {
    const std::vector<float> zeros(center ? 0 : size_t(n), 0.0f);
    scale_rows_backward(grad, z, numbers(scale), center ? numbers(*center) : zeros.data(), z_grad,
                        scale_grad, bias_grad, rows, n, dtype);
  }
};

// The stage in a rotation, as a tensor of its own.
Tensor stage_in(const LayerShape& s, const Tensor& rotation) {
  return viewed(rotation, {s.d / s.size(), s.size(), s.size()}, nullptr, s.n_blocks());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_from_skew_cpu(
    const Tensor& x, const Tensor& weight, const Tensor& skew_, const MaybeTensor& drop_mask,
    const MaybeTensor& offset, int64_t scale_base, const MaybeTensor& bias, bool save_z,
    bool fused) {
  const LayerShape s("linear_from_skew", x, weight, skew_, offset, bias);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float,
                  "linear_from_skew: x: expected float32 on a CPU");
  const auto scale = effective(offset, scale_base);
  const auto drop = mask_of(drop_mask, {s.rotation.n, s.rotation.n_blocks});
  const Tensor skew = dense(skew_), rotation = rotation_of(Cpu(), s, skew, drop);
  const bool rotated = is_rotated(skew);
  if (!fused || !rotated)
    return layer_forward(Cpu(), s, x, weight, rotation, scale, bias, save_z, rotated);
  const Tensor rows = viewed(dense(x), {s.rows, s.d});
  const auto [y, z] =
      rotated_linear_cpu(rows, weight, stage_in(s, rotation), scale, bias, true, save_z);
  return {s.output_of(x, y), z, rotation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_from_skew_backward_cpu(
    const Tensor& grad_, const Tensor& x, const Tensor& weight, const Tensor& skew_,
    const Tensor& rotation, const MaybeTensor& drop_mask, const MaybeTensor& offset,
    int64_t scale_base, const MaybeTensor& bias, const MaybeTensor& output, bool scaled,
    int64_t splits, bool need_bias, bool fused) {
  const LayerShape s("linear_from_skew_backward", x, weight, skew_, offset, bias);
  check_layer_backward(s, skew_, rotation, offset, output, splits, need_bias, fused);
  STD_TORCH_CHECK(splits == 1, "linear_from_skew_backward: splits: expected 1 on a CPU");
  const auto scale = effective(offset, scale_base);
  const auto drop = mask_of(drop_mask, {s.rotation.n, s.rotation.n_blocks});
  const Tensor skew = dense(skew_);
  auto z = output ? MaybeTensor(s.rows_of(*output, x, s.n)) : std::nullopt;
  if (z && scaled && !is_invertible(*scale)) {
    z = unscaled(Cpu(), s, dense(x), weight, address(rotation, s.n_blocks()), bias, true);
    scaled = false;
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor> grads;
  if (fused) {
    if (z) z = viewed(*z, {s.rows, s.n});
    const Tensor grad = viewed(s.rows_of(grad_, x, s.n), {s.rows, s.n});
    auto [x_grad, gram, scale_grad, bias_grad] =
        rotated_linear_backward_cpu(grad, viewed(dense(x), {s.rows, s.d}), weight,
                                    stage_in(s, rotation), scale, bias, z, 1, need_bias);
    const Tensor skew_grad = new_like(skew), scratch = new_tensor(skew, {s.n_blocks()});
    make_stage_backward(s.rotation, address(rotation), pointer<bool>(drop), gram.const_data_ptr(),
                        scratch.mutable_data_ptr(), skew_grad.mutable_data_ptr(), Cpu::dtype);
    if (!need_bias) bias_grad = new_tensor(skew, {0});
    grads = {s.input_of(x, x_grad), skew_grad, scale_grad, bias_grad};
  } else {
    grads = layer_backward(Cpu(), s, grad_, x, weight, skew, rotation, drop, scale, bias, z, splits,
                           need_bias);
  }
  if (z && scaled) {
    auto* sums = static_cast<float*>(std::get<2>(grads).mutable_data_ptr());
    for (int64_t j = 0; j < s.n; ++j) sums[j] /= numbers(*scale)[j];
  }
  return grads;
}

}  // namespace boft::binding
