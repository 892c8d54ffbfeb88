// The operator rotated_linear: all launches of a rotated layer in one call, forward and backward. It
// rotates the rows, multiplies them by the weight with torch's own product, and scales the result.
// Python could do the same in separate calls, but each of them costs host time.
#ifdef BOFT_OPS_CUDA
#include <array>

#include "binding_cuda.h"

namespace boft::binding {
namespace {

// Raises unless x (rows, d) and weight (n, d) fit together.
void check_layer(const char* op, const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) &&
                      x.scalar_type() == weight.scalar_type(),
                  op, ": expected x (rows, d) and weight (n, d) of one dtype");
  check_device(op, x, {&weight});
}

// Calls torch.nn.functional.linear, for which the stable ABI has no function.
Tensor linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  const auto error = torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "rotated_linear: torch's linear failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

// Returns y (rows, n), and z from before the scale if there is a scale and `save` is set, else an
// empty tensor for z. z is x R W^T, plus the bias if `bias_in_z`.
std::tuple<Tensor, Tensor> rotated_linear_cuda(const Tensor& x, const Tensor& weight,
                                               const Tensor& stage, const MaybeTensor& scale,
                                               const MaybeTensor& bias, bool bias_in_z, bool save) {
  check_layer("rotated_linear", x, weight);
  STD_TORCH_CHECK(bias_in_z || !bias || scale,
                  "rotated_linear: bias_in_z: expected true without a scale");
  check_square(stage, 3, "rotated_linear: stage");
  const auto center = bias_in_z ? bias : std::nullopt;
  const Tensor z = linear(rotate_cuda(x, stage, stage.size(2), 1, false, std::nullopt), weight, center);
  const Tensor none = new_tensor(x, {0, weight.size(0)});
  if (!scale) return {z, none};
  return {scale_cuda(z, *scale, center, bias), save ? z : none};
}

// Returns the gradient of x, `splits` partial sums of that of the stage, and those of scale and
// bias. The last two are empty without z. `center` is the bias if z holds it.
std::tuple<Tensor, Tensor, Tensor, Tensor> rotated_linear_backward_cuda(
    const Tensor& grad_, const Tensor& x, const Tensor& weight, const Tensor& stage,
    const MaybeTensor& scale, const MaybeTensor& center, const MaybeTensor& z, int64_t splits,
    bool need_bias) {
  check_layer("rotated_linear_backward", x, weight);
  check_square(stage, 3, "rotated_linear_backward: stage");
  STD_TORCH_CHECK(grad_.dim() == 2 && grad_.size(0) == x.size(0) &&
                      grad_.size(1) == weight.size(0) && grad_.scalar_type() == x.scalar_type(),
                  "rotated_linear_backward: grad: expected (rows, n) in the dtype of x");
  STD_TORCH_CHECK(scale || !z, "rotated_linear_backward: z: expected none without a scale");
  STD_TORCH_CHECK(z || !need_bias, "rotated_linear_backward: need_bias: expected false without z");
  Tensor grad = grad_;
  Tensor scale_grad = new_tensor(stage, {0});
  Tensor bias_grad = new_tensor(grad, {0});
  if (z) {
    std::tie(grad, scale_grad, bias_grad) = scale_backward_cuda(grad, *z, *scale, center);
  } else if (scale) {
    grad = scale_cuda(grad, *scale, std::nullopt, std::nullopt);
  }
  const Tensor rows_grad = torch::stable::matmul(grad, weight);
  auto [x_grad, partials] =
      rotate_backward_cuda(rows_grad, x, stage, stage.size(2), 1, false, splits);
  return {x_grad, partials, scale_grad, bias_grad};
}

}  // namespace boft::binding
#endif
