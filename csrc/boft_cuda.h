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

// Stage matrices: the product C_{n-1} ... C_0 of n butterfly factors, the first of which has the given
// stride, in chunks of b/2 features; of at most kMaxSize rows. float32 or float64.
//   factors: (n, n_blocks, b, b) -> stages: (n_blocks b / size, size, size), size = b 2^(n-1)
constexpr int64_t kMaxSize = 256;
int compose(const void* factors, void* stages, int64_t n, int64_t n_blocks, int64_t b,
            int64_t stride, DType dtype, Queue queue);
// Its gradient: (n, n_blocks, b, b) from `splits` partial sums of that of the stages.
int compose_backward(const void* factors, const void* grad, void* factors_grad, int64_t n,
                     int64_t n_blocks, int64_t b, int64_t stride, int64_t splits, DType dtype,
                     Queue queue);

// cayley, then compose with stride 1, for stages of at most kMaxRotation rows; and the gradient of
// both, for which blocks_grad is memory of the size of blocks to work in. float32 or float64.
constexpr int64_t kMaxRotation = 64;
int rotation(const void* skew, const bool* drop, void* blocks, void* stages, int64_t n,
             int64_t n_blocks, int64_t b, DType dtype, Queue queue);
int rotation_backward(const void* blocks, const bool* drop, const void* grad, void* blocks_grad,
                      void* skew_grad, int64_t n, int64_t n_blocks, int64_t b, int64_t splits,
                      DType dtype, Queue queue);

// y = x R, or x R^T if `transpose`, R block-diagonal over groups of at most kMaxSize; x, y: (rows, d).
//   stages: (d / size, size, size), in float32 for halves
int rotate(const void* x, const void* stages, void* y, int64_t rows, int64_t d, Stage stage,
           bool transpose, DType dtype, Queue queue);
// Its gradients: x_grad = grad R^T (grad R if `transpose`), unless x_grad is null, and `splits` partial
// sums over the rows, (splits, d / size, size, size), of x^T grad (grad^T x), in the type of the stages.
int rotate_backward(const void* grad, const void* x, const void* stages, void* x_grad,
                    void* partials, int64_t rows, int64_t d, Stage stage, bool transpose,
                    int64_t splits, DType dtype, Queue queue);

// y = x R, or x R^T, with the R of the adapter in [0, n_adapters) that `index` (rows,) names; of -1 y = x,
// of other numbers NaN.
//   stages: (n_adapters, d / size, size, size), in float32 for halves
int rotate_indexed(const void* x, const void* stages, const int32_t* index, void* y,
                   int64_t n_adapters, int64_t rows, int64_t d, Stage stage, bool transpose,
                   DType dtype, Queue queue);

// y = scale * (x - center) + bias for x (rows, n); bias and center (n,) or both null. Vectors are in
// float32 for halves.
int scale(const void* x, const void* scale, const void* center, const void* bias, void* y,
          int64_t rows, int64_t n, DType dtype, Queue queue);

// Gradients of y = scale * (x - center) + bias, from grad (rows, n): x_grad = grad * scale, and the
// column sums scale_grad of grad * (x - center), bias_grad of grad. A center of null is 0.
//   partials: memory to work in, (scale_splits(rows, n), 2, n) in the type of the vectors
int64_t scale_splits(int64_t rows, int64_t n);
int scale_backward(const void* grad, const void* x, const void* scale, const void* center,
                   void* x_grad, void* partials, void* scale_grad, void* bias_grad, int64_t rows,
                   int64_t n, DType dtype, Queue queue);

}  // namespace boft::cuda
