// The CUDA kernels' own interface: raw device pointers and sizes. Neither this header nor any file of
// csrc/cuda includes torch; csrc/binding_cuda* translate between the two. Every function checks
// nothing, queues its work and returns 0 or a CUDA error, for error_string(). Tensors are contiguous.
// The same arguments give the same bits in every run.
#pragma once

#include <cstdint>

#include "boft_kernels.h"  // Stage

namespace boft::cuda {

enum class DType : int { F32, F64, BF16, F16 };

// Where the work goes: a device, and a cudaStream_t of it.
struct Queue {
  int device;
  void* stream;
};

const char* error_string(int error);

// Cayley transform R = (I + Q)(I - Q)^-1, computed in float64; b <= kMaxBlock.
//   skew:   (n_blocks, b(b-1)/2) packed strict upper triangles, row-major
//   drop:   (n_blocks,), true for blocks that are to be the identity; or null
//   blocks: (n_blocks, b, b)
constexpr int64_t kMaxBlock = 64;
int cayley(const void* skew, const bool* drop, void* blocks, int64_t n_blocks, int64_t b,
           DType dtype, Queue queue);
// Its gradient: U = 1/2 (I + R)^T G (I + R)^T, skew_grad_ij = U_ij - U_ji for i < j; 0 for blocks
// that were dropped. Computed in at least float32.
int cayley_backward(const void* blocks, const bool* drop, const void* grad, void* skew_grad,
                    int64_t n_blocks, int64_t b, DType dtype, Queue queue);

// y = x R, or x R^T if `transpose`, R block-diagonal over groups of at most kMaxSize; x, y: (rows, d).
//   stages: (d / size, size, size), in float32 for halves
constexpr int64_t kMaxSize = 256;
int rotate(const void* x, const void* stages, void* y, int64_t rows, int64_t d, Stage stage,
           bool transpose, DType dtype, Queue queue);
// Its gradients: x_grad = grad R^T (grad R if `transpose`), unless x_grad is null, and `splits` partial
// sums over the rows, (splits, d / size, size, size), of x^T grad (grad^T x), in the type of the stages.
int rotate_backward(const void* grad, const void* x, const void* stages, void* x_grad,
                    void* partials, int64_t rows, int64_t d, Stage stage, bool transpose,
                    int64_t splits, DType dtype, Queue queue);

}  // namespace boft::cuda
