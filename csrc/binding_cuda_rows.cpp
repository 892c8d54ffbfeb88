// Operators that rotate activations, on a GPU, and their gradients.
#ifdef BOFT_OPS_CUDA
#include "binding_cuda.h"

namespace boft::binding {
namespace {

void check_size(const char* op, const boft::Stage& shape) {
  STD_TORCH_CHECK(shape.size <= boft::cuda::kMaxStage, op, ": expected groups of at most ",
                  boft::cuda::kMaxStage, " features, got ", shape.size);
}

// Returns partial sums of the gradient of a stage, (splits, d / size, size, size). If `stage` and
// x_grad are given, also fills x_grad, the gradient of x.
Tensor gram_of(const char* op, const Tensor& grad_, const Tensor& x_, const boft::Stage& shape,
               bool transpose, int64_t splits, const Tensor* stage, Tensor* x_grad) {
  const auto dtype = cuda_dtype_of(x_, op);
  check_size(op, shape);
  STD_TORCH_CHECK(alike(x_, grad_), op, ": grad: expected the shape and dtype of x");
  STD_TORCH_CHECK(splits > 0, op, ": splits: expected a positive number, got ", splits);
  check_device(op, x_, {&grad_, stage});
  const Tensor x = dense(x_), grad = dense(grad_);
  const int64_t rows = x.size(0), d = x.size(1);
  Tensor partials = new_tensor(x, {splits, d / shape.size, shape.size, shape.size},
                                             compute_dtype(x));
  const int64_t ranges = boft::cuda::rotate_backward_ranges(rows, d, shape, splits, dtype);
  std::optional<Tensor> scratch;
  if (ranges > 1)
    scratch = new_tensor(x, {splits * ranges, d / shape.size, shape.size, shape.size},
                         compute_dtype(x));
  check_launch(op, boft::cuda::rotate_backward(
                       grad.const_data_ptr(), x.const_data_ptr(),
                       stage ? stage->const_data_ptr() : nullptr,
                       x_grad ? x_grad->mutable_data_ptr() : nullptr, partials.mutable_data_ptr(),
                       scratch ? scratch->mutable_data_ptr() : nullptr, rows, d, shape, transpose,
                       splits, dtype, queue_of(x)));
  return partials;
}

}  // namespace

Tensor rotate_cuda(const Tensor& x_, const Tensor& stage_, int64_t chunk, int64_t stride,
                   bool transpose, const MaybeTensor& factor_) {
  const auto dtype = cuda_dtype_of(x_, "rotate: x");
  const auto shape = stage_of(x_, stage_, chunk, stride);
  check_size("rotate", shape);
  check_device("rotate", x_, {&stage_, given(factor_)});
  const Tensor x = dense(x_), stage = dense(stage_);
  const auto factor = factor_of(x, factor_);
  Tensor y = new_like(x);
  check_launch("rotate", boft::cuda::rotate(x.const_data_ptr(), stage.const_data_ptr(),
                                            pointer<void>(factor), y.mutable_data_ptr(),
                                            x.size(0), x.size(1), shape, transpose, dtype,
                                            queue_of(x)));
  return y;
}

Tensor rotate_indexed_cuda(const Tensor& x_, const Tensor& stages_, const Tensor& index_,
                           int64_t chunk, int64_t stride, bool transpose) {
  const auto dtype = cuda_dtype_of(x_, "rotate_indexed: x");
  const auto shape = stage_of(x_, stages_, index_, chunk, stride);
  check_size("rotate_indexed", shape);
  check_device("rotate_indexed", x_, {&stages_, &index_});
  STD_TORCH_CHECK(stages_.size(0) <= INT32_MAX, "rotate_indexed: stages: too many adapters");
  const Tensor x = dense(x_), stages = dense(stages_);
  const Tensor index = dense(index_);
  Tensor y = new_like(x);
  check_launch("rotate_indexed",
               boft::cuda::rotate_indexed(
                   x.const_data_ptr(), stages.const_data_ptr(),
                   static_cast<const int32_t*>(index.const_data_ptr()), y.mutable_data_ptr(),
                   stages.size(0), x.size(0), x.size(1), shape, transpose, dtype, queue_of(x)));
  return y;
}

Tensor rotate_stage_grad_cuda(const Tensor& x, const Tensor& grad, int64_t size, int64_t chunk, int64_t stride,
                 int64_t splits) {
  return gram_of("rotate_stage_grad", grad, x, stage_of(x, size, chunk, stride), false, splits, nullptr,
                 nullptr);
}

Tensor segment_stage_grads_cuda(const Tensor& x_, const Tensor& grad_, const Tensor& offsets_,
                                int64_t size, int64_t chunk, int64_t stride, int64_t splits) {
  const char* op = "segment_stage_grads";
  const auto dtype = cuda_dtype_of(x_, op);
  const auto shape = stage_of_segments(x_, grad_, offsets_, size, chunk, stride);
  check_size(op, shape);
  STD_TORCH_CHECK(splits > 0, op, ": splits: expected a positive number, got ", splits);
  check_device(op, x_, {&grad_, &offsets_});
  const Tensor x = dense(x_), grad = dense(grad_);
  const Tensor offsets = dense(offsets_);
  const int64_t rows = x.size(0), d = x.size(1), n = offsets.size(0);
  Tensor partials =
      new_tensor(x, {splits, n, d / size, size, size}, compute_dtype(x));
  check_launch(op, boft::cuda::segment_stage_grads(
                       x.const_data_ptr(), grad.const_data_ptr(),
                       static_cast<const int32_t*>(offsets.const_data_ptr()),
                       partials.mutable_data_ptr(), n, rows, d, shape, splits, dtype, queue_of(x)));
  return partials;
}

std::tuple<Tensor, Tensor> rotate_backward_cuda(const Tensor& grad, const Tensor& x,
                                                const Tensor& stage_, int64_t chunk, int64_t stride,
                                                bool transpose, int64_t splits) {
  const auto shape = stage_of(x, stage_, chunk, stride);
  const Tensor stage = dense(stage_);
  Tensor x_grad = new_like(dense(x));
  const Tensor partials =
      gram_of("rotate_backward", grad, x, shape, transpose, splits, &stage, &x_grad);
  return {x_grad, partials};
}

}  // namespace boft::binding
#endif
