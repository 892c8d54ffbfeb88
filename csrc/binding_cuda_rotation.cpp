// From skew-symmetric parameters to stage matrices, on a GPU.
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
  const Tensor skew = torch::stable::contiguous(skew_);
  auto sizes = leading_sizes(skew, 1);
  const auto drop = mask_of(drop_, sizes);
  const int64_t n = product(sizes);
  sizes.insert(sizes.end(), {b, b});
  Tensor blocks = torch::stable::new_empty(skew, sizes);
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
  const Tensor blocks = torch::stable::contiguous(blocks_), grad = torch::stable::contiguous(grad_);
  auto sizes = leading_sizes(blocks, 2);
  const auto drop = mask_of(drop_, sizes);
  const int64_t n = product(sizes);
  sizes.push_back(b * (b - 1) / 2);
  Tensor skew_grad = torch::stable::new_empty(blocks, sizes);
  check_launch("cayley_backward",
               boft::cuda::cayley_backward(blocks.const_data_ptr(), pointer<bool>(drop),
                                           grad.const_data_ptr(), skew_grad.mutable_data_ptr(), n,
                                           b, dtype, queue_of(blocks)));
  return skew_grad;
}

}  // namespace boft::binding
#endif
