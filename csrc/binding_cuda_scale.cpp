// The operator scale, which scales the outputs of a layer, and its gradients, on a GPU.
#ifdef BOFT_OPS_CUDA
#include "binding_cuda.h"

namespace boft::binding {
namespace {

// Contiguous vector (n,) in the compute dtype of x. It may come in the dtype of x too, and is
// converted then, which is cheap beside the rows.
MaybeTensor wide_vector(const Tensor& x, const MaybeTensor& t, const char* name) {
  if (!t) return std::nullopt;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(1) &&
                      (t->scalar_type() == compute_dtype(x) || t->scalar_type() == x.scalar_type()),
                  name, ": expected (n,) in the dtype of x, or float32 for halves");
  const bool wide = t->scalar_type() == compute_dtype(x);
  return dense(wide ? *t : torch::stable::to(*t, compute_dtype(x)));
}

}  // namespace

Tensor scale_cuda(const Tensor& x_, const Tensor& scale_, const MaybeTensor& center_,
                  const MaybeTensor& bias_) {
  const auto dtype = cuda_dtype_of(x_, "scale: x");
  STD_TORCH_CHECK(x_.dim() == 2, "scale: x: expected (rows, n)");
  STD_TORCH_CHECK(bias_ || !center_, "scale: center: expected none without a bias");
  check_device("scale", x_, {&scale_, given(center_), given(bias_)});
  const Tensor x = dense(x_);
  const auto scale = wide_vector(x, scale_, "scale: scale");
  const auto center = wide_vector(x, center_, "scale: center");
  const auto bias = wide_vector(x, bias_, "scale: bias");
  Tensor y = new_like(x);
  check_launch("scale", boft::cuda::scale(x.const_data_ptr(), scale->const_data_ptr(), 0,
                                          pointer<void>(center), pointer<void>(bias),
                                          y.mutable_data_ptr(), x.size(0), x.size(1), dtype,
                                          queue_of(x)));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> scale_backward_cuda(const Tensor& grad_, const Tensor& x_,
                                                       const MaybeTensor& scale_,
                                                       const MaybeTensor& center_) {
  const auto dtype = cuda_dtype_of(x_, "scale_backward: x");
  STD_TORCH_CHECK(x_.dim() == 2 && alike(x_, grad_),
                  "scale_backward: grad: expected the shape and dtype of x, (rows, n)");
  check_device("scale_backward", grad_, {&x_, given(scale_), given(center_)});
  const Tensor grad = dense(grad_), x = dense(x_);
  const auto scale = wide_vector(x, scale_, "scale_backward: scale");
  const auto center = wide_vector(x, center_, "scale_backward: center");
  const int64_t rows = x.size(0), n = x.size(1);
  const auto wide = compute_dtype(x);
  Tensor x_grad = new_tensor(x, {scale ? rows : 0, n});
  Tensor scale_grad = new_tensor(x, {n}, wide), bias_grad = new_tensor(x, {n}, wide);
  Tensor partials = new_tensor(x, {boft::cuda::scale_splits(rows, n), 2, n}, wide);
  check_launch("scale_backward",
               boft::cuda::scale_backward(
                   grad.const_data_ptr(), x.const_data_ptr(), pointer<void>(scale), 0,
                   pointer<void>(center), scale ? x_grad.mutable_data_ptr() : nullptr,
                   partials.mutable_data_ptr(),
                   scale_grad.mutable_data_ptr(), bias_grad.mutable_data_ptr(), rows, n, dtype,
                   queue_of(x)));
  return {x_grad, scale_grad, bias_grad};
}

}  // namespace boft::binding
#endif
