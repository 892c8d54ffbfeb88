// Operators that make stage matrices from skew-symmetric parameters, on a GPU: cayley, compose, and
// both in one, stage_from_skew; each with its gradient.
#ifdef BOFT_OPS_CUDA
#include "binding_cuda.h"

namespace boft::binding {
namespace {

void check_block_size(const char* op, int64_t b) {
  STD_TORCH_CHECK(b <= boft::cuda::kMaxBlock, op, ": expected blocks of at most ",
                  boft::cuda::kMaxBlock, ", got ", b);
}

}  // namespace

Tensor cayley_cuda(const Tensor& skew_, const MaybeTensor& drop_) {
  const int64_t b = block_size(skew_);
  check_block_size("cayley", b);
  check_device("cayley", skew_, {given(drop_)});
  const auto dtype = cuda_dtype_of(skew_, "cayley: skew");
  const Tensor skew = dense(skew_);
  auto sizes = leading_sizes(skew, 1);
  const auto drop = mask_of(drop_, sizes);
  const int64_t n = product(sizes);
  sizes.insert(sizes.end(), {b, b});
  Tensor blocks = new_tensor(skew, sizes);
  check_launch("cayley",
               boft::cuda::cayley(skew.const_data_ptr(), pointer<bool>(drop),
                                  blocks.mutable_data_ptr(), n, b, dtype, queue_of(skew)));
  return blocks;
}

Tensor cayley_backward_cuda(const Tensor& blocks_, const MaybeTensor& drop_, const Tensor& grad_) {
  check_square(blocks_, 0, "cayley_backward: blocks");
  STD_TORCH_CHECK(alike(blocks_, grad_),
                  "cayley_backward: grad: expected the shape and dtype of blocks");
  check_device("cayley_backward", blocks_, {given(drop_), &grad_});
  const int64_t b = blocks_.size(blocks_.dim() - 1);
  check_block_size("cayley_backward", b);
  const auto dtype = cuda_dtype_of(blocks_, "cayley_backward: blocks");
  const Tensor blocks = dense(blocks_), grad = dense(grad_);
  auto sizes = leading_sizes(blocks, 2);
  const auto drop = mask_of(drop_, sizes);
  const int64_t n = product(sizes);
  sizes.push_back(b * (b - 1) / 2);
  Tensor skew_grad = new_tensor(blocks, sizes);
  check_launch("cayley_backward",
               boft::cuda::cayley_backward(blocks.const_data_ptr(), pointer<bool>(drop),
                                           grad.const_data_ptr(), skew_grad.mutable_data_ptr(), n,
                                           b, dtype, queue_of(blocks)));
  return skew_grad;
}

namespace {

void check_stage_size(const char* op, const Butterfly& shape, int64_t most) {
  STD_TORCH_CHECK(shape.size <= most, op, ": expected stages of at most ", most, " rows, got ",
                  shape.size);
}

}  // namespace

Tensor compose_cuda(const Tensor& factors_, int64_t first) {
  const auto dtype = wide_cuda_dtype_of(factors_, "compose: factors");
  const auto shape = Butterfly::of(factors_, first);
  check_stage_size("compose", shape, boft::cuda::kMaxStage);
  const Tensor factors = dense(factors_);
  Tensor stages = new_tensor(factors, {shape.groups, shape.size, shape.size});
  check_launch("compose",
               boft::cuda::compose(factors.const_data_ptr(), stages.mutable_data_ptr(), shape.n,
                                   shape.n_blocks, shape.b, shape.stride, dtype,
                                   queue_of(factors)));
  return stages;
}

Tensor compose_backward_cuda(const Tensor& factors_, const Tensor& grad_, int64_t first) {
  const auto dtype = wide_cuda_dtype_of(factors_, "compose: factors");
  const auto shape = Butterfly::of(factors_, first);
  check_stage_size("compose_backward", shape, boft::cuda::kMaxStage);
  check_device("compose_backward", factors_, {&grad_});
  const Tensor factors = dense(factors_), grad = shape.grad(grad_, factors_);
  Tensor factors_grad = new_like(factors);
  check_launch("compose_backward",
               boft::cuda::compose_backward(factors.const_data_ptr(), grad.const_data_ptr(),
                                            factors_grad.mutable_data_ptr(), shape.n,
                                            shape.n_blocks, shape.b, shape.stride, grad.size(0),
                                            dtype, queue_of(factors)));
  return factors_grad;
}

std::tuple<Tensor, Tensor> stage_from_skew_cuda(const Tensor& skew_, const MaybeTensor& drop_) {
  const auto dtype = wide_cuda_dtype_of(skew_, "stage_from_skew: skew");
  STD_TORCH_CHECK(skew_.dim() == 3, "stage_from_skew: skew: expected 3 dimensions");
  const Butterfly shape(skew_.size(0), skew_.size(1), block_size(skew_), 0);
  check_stage_size("stage_from_skew", shape, boft::cuda::kMaxRotation);
  check_device("stage_from_skew", skew_, {given(drop_)});
  const Tensor skew = dense(skew_);
  const auto drop = mask_of(drop_, {shape.n, shape.n_blocks});
  Tensor blocks = new_tensor(skew, {shape.n, shape.n_blocks, shape.b, shape.b});
  Tensor stages = new_tensor(skew, {shape.groups, shape.size, shape.size});
  check_launch("stage_from_skew",
               boft::cuda::stage_from_skew(skew.const_data_ptr(), pointer<bool>(drop),
                                    blocks.mutable_data_ptr(), stages.mutable_data_ptr(), shape.n,
                                    shape.n_blocks, shape.b, dtype, queue_of(skew)));
  return {blocks, stages};
}

Tensor stage_from_skew_backward_cuda(const Tensor& blocks_, const MaybeTensor& drop_,
                                     const Tensor& grad_) {
  const auto dtype = wide_cuda_dtype_of(blocks_, "stage_from_skew_backward: blocks");
  const auto shape = Butterfly::of(blocks_, 0);
  check_stage_size("stage_from_skew_backward", shape, boft::cuda::kMaxRotation);
  check_device("stage_from_skew_backward", blocks_, {given(drop_), &grad_});
  const Tensor blocks = dense(blocks_), grad = shape.grad(grad_, blocks_);
  const auto drop = mask_of(drop_, {shape.n, shape.n_blocks});
  Tensor blocks_grad = new_like(blocks);
  Tensor skew_grad = new_tensor(
      blocks, {shape.n, shape.n_blocks, shape.b * (shape.b - 1) / 2});
  check_launch("stage_from_skew_backward",
               boft::cuda::stage_from_skew_backward(
                   blocks.const_data_ptr(), pointer<bool>(drop), grad.const_data_ptr(),
                   blocks_grad.mutable_data_ptr(), skew_grad.mutable_data_ptr(), shape.n,
                   shape.n_blocks, shape.b, grad.size(0), dtype, queue_of(blocks)));
  return skew_grad;
}

}  // namespace boft::binding
#endif
