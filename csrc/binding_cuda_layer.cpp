// The operator linear_from_skew on a GPU: all launches of a rotated layer in one call, and of its
// gradients. The products are torch's own.
#ifdef BOFT_OPS_CUDA
#include "binding_cuda.h"
#include "binding_layer.h"

namespace boft::binding {
namespace {

// The bias, if the output before the scale has it in it. In half precision with a scale it has not:
// beside a large bias it would be rounded to little of what the scale is for.
MaybeTensor center_of(const Tensor& x, const MaybeTensor& scale, const MaybeTensor& bias) {
  return scale && compute_dtype(x) != x.scalar_type() ? std::nullopt : bias;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_from_skew_cuda(
    const Tensor& x, const Tensor& weight, const Tensor& skew, const MaybeTensor& drop_mask,
    const MaybeTensor& scale, const MaybeTensor& bias, bool save_z, bool) {
  const LayerShape s("linear_from_skew", x, weight, skew, scale, bias);
  check_device("linear_from_skew", x, {&weight, &skew, given(drop_mask), given(scale), given(bias)});
  save_z = save_z && scale;
  const auto [blocks, stage] = stage_from_skew_cuda(skew, drop_mask);
  const auto center = center_of(x, scale, bias);
  const Tensor rotated = rotate_cuda(s.rows_of(x, s.d), stage, s.size, 1, false);
  const Tensor z = product(rotated, weight, center);
  Tensor y = save_z ? new_like(z) : z;
  if (scale) scale_into_cuda(z, *scale, center, bias, y);
  return {s.output_of(x, y), save_z ? z : new_tensor(z, {0, s.n}), blocks, stage};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_from_skew_backward_cuda(
    const Tensor& grad_, const Tensor& x, const Tensor& weight, const Tensor& blocks,
    const Tensor& stage, const MaybeTensor& drop_mask, const MaybeTensor& scale,
    const MaybeTensor& bias, const MaybeTensor& output, bool scaled, int64_t splits, bool) {
  const LayerShape s("linear_from_skew_backward", x, weight, blocks, stage, scale, bias);
  check_device("linear_from_skew_backward", x,
               {&grad_, &weight, &blocks, &stage, given(drop_mask), given(scale), given(bias),
                given(output)});
  STD_TORCH_CHECK(!scaled, "linear_from_skew_backward: is_scaled: expected false on a GPU");
  STD_TORCH_CHECK(!output || scale,
                  "linear_from_skew_backward: output: expected none without a scale");
  Tensor grad = s.rows_of(grad_, s.n);
  Tensor scale_grad = grad, bias_grad = grad;
  if (output) {
    std::tie(grad, scale_grad, bias_grad) = scale_backward_cuda(
        grad, s.rows_of(*output, s.n), *scale, center_of(x, scale, bias));
  } else {
    scale_grad = new_tensor(blocks, {0});
    bias_grad = new_tensor(grad, {0});
    if (scale) grad = scale_cuda(grad, *scale, std::nullopt, std::nullopt);
  }
  auto [x_grad, partials] = rotate_backward_cuda(product(grad, weight), s.rows_of(x, s.d), stage,
                                                 s.size, 1, false, splits);
  return {s.input_of(x, x_grad), stage_from_skew_backward_cuda(blocks, drop_mask, partials),
          scale_grad, bias_grad};
}

}  // namespace boft::binding
#endif
