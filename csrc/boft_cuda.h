// Interface of the CUDA kernels: raw device pointers and sizes. Neither this header nor any file of
// csrc/cuda includes torch; csrc/binding_cuda*.cpp translate between tensors and these functions.
//
// Rules that hold for every function below:
// - It checks nothing. The bindings check shapes, dtypes and limits, and report errors.
// - It queues its work on a stream and returns 0 or a CUDA error for error_string(); it waits for
//   nothing.
// - Tensors are contiguous, row-major, on the device of the queue. Sizes count elements, rows,
//   blocks or groups, never bytes.
// - `dtype` is that of the tensors, all of which have it unless something else is said. "float32
//   for halves" means: in `dtype`, but in float32 if it is bfloat16 or float16.
// - The same arguments give the same bits in every run: no sum depends on the order of threads.
#pragma once

#include <cstdint>

#include "boft_kernels.h"  // for Stage

namespace boft::cuda {

// Element type of the tensors that a kernel reads and writes.
enum class DType : int { F32, F64, BF16, F16 };

// Place where the work is queued: the number of a device, and a cudaStream_t of that device.
struct Queue {
  int device;
  void* stream;
};

// Message of an error that a function returned.
const char* error_string(int error);

// Limit on b, the size of a block: a thread of the Cayley kernels holds a column of a block in
// registers, and 128 doubles would need more than the 255 registers that a thread can have.
constexpr int64_t kMaxBlock = 64;
// Computes the Cayley transform R = (I + Q)(I - Q)^-1 in float64, then rounded to `dtype`.
//   skew:   (n_blocks, b(b-1)/2), strict upper triangles of the Q, packed row-major; b <= kMaxBlock
//   drop:   (n_blocks,), true for a block that is to be the identity; null if there is none
//   blocks: (n_blocks, b, b), output
int cayley(const void* skew, const bool* drop, void* blocks, int64_t n_blocks, int64_t b,
           DType dtype, Queue queue);
// Computes the gradient of `cayley`, in float32 for halves. With G the gradient of R and
// U = 1/2 (I + R)^T G (I + R)^T it is skew_grad_ij = U_ij - U_ji for i < j, and 0 for a dropped
// block.
//   blocks, grad: (n_blocks, b, b), R and G
//   skew_grad:    (n_blocks, b(b-1)/2), output
int cayley_backward(const void* blocks, const bool* drop, const void* grad, void* skew_grad,
                    int64_t n_blocks, int64_t b, DType dtype, Queue queue);

// Limit on the size of a stage: the rows of one of its matrices, the features of one of its groups.
constexpr int64_t kMaxStage = 256;
// Multiplies n butterfly factors to the dense matrices C_{n-1} ... C_0 of one stage. Computed in
// `dtype`, which is float32 or float64.
//   factors: (n, n_blocks, b, b), where b is even if n > 1
//   stages:  (n_blocks b / size, size, size) with size = b 2^(n-1) <= kMaxStage, output
//   stride:  distance of the chunks that factor 0 mixes, in chunks of b/2 features: a power of two
int compose(const void* factors, void* stages, int64_t n, int64_t n_blocks, int64_t b,
            int64_t stride, DType dtype, Queue queue);
// Computes the gradient of `compose`.
//   grad:         (splits, n_blocks b / size, size, size), partial sums of the gradient of the
//                 stages, as rotate_backward writes them; they are added up in order
//   factors_grad: (n, n_blocks, b, b), output
int compose_backward(const void* factors, const void* grad, void* factors_grad, int64_t n,
                     int64_t n_blocks, int64_t b, int64_t stride, int64_t splits, DType dtype,
                     Queue queue);

// Limit on the size of a stage that `stage_from_skew` makes: its kernel composes all columns of a group at
// once, and two float64 matrices of this size fill the 64 KiB of shared memory that it may have.
constexpr int64_t kMaxRotation = 64;
// Computes `cayley` and then `compose` with stride 1, in one launch if b <= 32. `dtype` is float32
// or float64.
//   skew:   (n, n_blocks, b(b-1)/2);  drop: (n, n_blocks) or null
//   blocks: (n, n_blocks, b, b), output of `cayley`, which the gradient needs
//   stages: (n_blocks b / size, size, size) with size = b 2^(n-1) <= kMaxRotation, output
int stage_from_skew(const void* skew, const bool* drop, void* blocks, void* stages, int64_t n,
             int64_t n_blocks, int64_t b, DType dtype, Queue queue);
// Computes the gradient of `stage_from_skew`.
//   grad:        (splits, n_blocks b / size, size, size), partial sums of the gradient of the
//                stages
//   blocks_grad: (n, n_blocks, b, b), scratch memory
//   skew_grad:   (n, n_blocks, b(b-1)/2), output
int stage_from_skew_backward(const void* blocks, const bool* drop, const void* grad, void* blocks_grad,
                      void* skew_grad, int64_t n, int64_t n_blocks, int64_t b, int64_t splits,
                      DType dtype, Queue queue);

// Computes y = x R, or x R^T if `transpose`, where R is block-diagonal over the groups of the
// stage.
//   x, y:   (rows, d)
//   stages: (d / size, size, size), float32 for halves; size <= kMaxStage
//   factor: (rows,), of each row of y, in the dtype of the stages; null stands for ones
int rotate(const void* x, const void* stages, const void* factor, void* y, int64_t rows, int64_t d,
           Stage stage, bool transpose, DType dtype, Queue queue);
// Computes the gradients of `rotate`.
//   grad, x:  (rows, d), the gradient of y, and x
//   stages:   as for `rotate`; unused if x_grad is null
//   x_grad:   (rows, d), output: grad R^T, or grad R if `transpose`; null if it is not wanted
//   partials: (splits, d / size, size, size), output in the dtype of the stages. Each split has the
//             sum over its part of the rows of x^T grad, or of grad^T x if `transpose`; the sum of
//             all splits is the gradient of the stages.
//   scratch:  (splits rotate_backward_ranges(..), d / size, size, size) in the dtype of the stages, or
//             null: then the kernels have fewer blocks of threads than are fastest
int rotate_backward(const void* grad, const void* x, const void* stages, void* x_grad,
                    void* partials, void* scratch, int64_t rows, int64_t d, Stage stage,
                    bool transpose, int64_t splits, DType dtype, Queue queue);
// Ranges of rows that `rotate_backward` cuts each split into; 1 if it needs no scratch memory.
int64_t rotate_backward_ranges(int64_t rows, int64_t d, Stage stage, int64_t splits, DType dtype);

// Computes row i of y = x R, or x R^T if `transpose`, with the R of adapter index[i]. The row is
// copied if index[i] is -1, and filled with NaN if it is any other number outside of
// [0, n_adapters), since an index on the device cannot be checked without waiting for it.
//   x, y:   (rows, d)
//   stages: (n_adapters, d / size, size, size), float32 for halves; size <= kMaxStage
//   index:  (rows,); fastest if rows of one adapter are neighbors
int rotate_indexed(const void* x, const void* stages, const int32_t* index, void* y,
                   int64_t n_adapters, int64_t rows, int64_t d, Stage stage, bool transpose,
                   DType dtype, Queue queue);

// Computes the gradient of the stage of every segment of the rows: x^T grad of each group, summed
// over the rows [offsets[e-1], offsets[e]) of segment e, the first of which begins at row 0. Offsets
// that descend or leave [0, rows] are cut to it.
//   x, grad:  (rows, d);  stage.size <= kMaxStage
//   offsets:  (n_segments,), the end of each segment; rows from the last one on are in none
//   partials: (splits, n_segments, d / size, size, size), output, float32 for halves. Each split has
//             the sums over its part of the rows of each segment.
int segment_stage_grads(const void* x, const void* grad, const int32_t* offsets, void* partials,
                        int64_t n_segments, int64_t rows, int64_t d, Stage stage, int64_t splits,
                        DType dtype, Queue queue);

// Computes y = (scale_base + scale) * (x - center) + bias.
//   x, y:                (rows, n)
//   scale, center, bias: (n,), float32 for halves; center and bias are both null or both given
int scale(const void* x, const void* scale, int scale_base, const void* center, const void* bias,
          void* y, int64_t rows, int64_t n, DType dtype, Queue queue);

// Number of parts of the rows that `scale_backward` sums apart.
int64_t scale_splits(int64_t rows, int64_t n);
// Computes the gradients of y = (scale_base + scale) * (x - center) + bias.
//   grad, x:               (rows, n), the gradient of y, and x
//   scale, center:         (n,), float32 for halves; a center of null is 0
//   x_grad:                (rows, n), output: grad * (scale_base + scale); null if it is not wanted,
//                          and scale is unused then
//   partials:              (scale_splits(rows, n), 2, n) in the dtype of scale, scratch memory
//   scale_grad, bias_grad: (n,) in the dtype of scale, output: sums over the rows of
//                          grad * (x - center) and of grad
int scale_backward(const void* grad, const void* x, const void* scale, int scale_base,
                   const void* center, void* x_grad, void* partials, void* scale_grad,
                   void* bias_grad, int64_t rows, int64_t n, DType dtype, Queue queue);

}  // namespace boft::cuda
