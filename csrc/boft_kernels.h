// Interface of the CPU kernels: raw pointers and sizes. Neither this header nor any file of
// csrc/cpu includes torch; csrc/binding*.cpp translate between tensors and these functions.
//
// Rules that hold for every kernel below:
// - It checks nothing. The bindings check shapes and dtypes, and report errors.
// - It takes every size, unless a limit is named here. boft_ops calls it for those sizes only for
//   which it is faster than a BLAS.
// - Tensors are contiguous, row-major, and aligned to their elements only.
// - Sizes, strides and ranges count elements, rows, blocks or groups, never bytes.
// - [begin, end) is the part of the work that this call does. The parts are independent and no sum
//   crosses them, so any split over threads gives the same bits.
#pragma once

#include <cstdint>

namespace boft {

// Element type of the tensors that a kernel reads and writes.
enum class DType : int { F32, F64, BF16 };

// Position of the features that a stage mixes. A stage is a product of neighboring butterfly
// factors. It consists of d / size dense matrices of size x size, one for each group of features.
// A group is size / chunk chunks of `chunk` neighboring features; they lie `stride` chunks apart.
// With h = g div stride and l = g mod stride, element e of chunk c of group g is feature
// ((h * size / chunk + c) * stride + l) * chunk + e. `chunk` divides size, size * stride divides d.
struct Stage {
  int64_t size, chunk, stride;
};

namespace cpu {

// Name of the instruction set that the kernels use on this machine: "baseline", "avx2", "avx512".
const char* isa();

// Least number of multiply-adds that a thread gets. It changes how work is divided, never the order
// in which numbers are added, so results do not depend on the number of threads.
constexpr int64_t kGrain = 65536;
// Number of items that make up one grain, if an item costs share * work multiply-adds; at least 1.
inline int64_t grain_of(int64_t work, int64_t share = 1) {
  const int64_t items = kGrain / (share * (work < 1 ? 1 : work));
  return items < 1 ? 1 : items;
}

// Number of blocks in a tile of the Cayley kernels: one block for each vector lane.
constexpr int64_t kTile = 8;

// Computes the Cayley transform R = (I + Q)(I - Q)^-1 of the blocks in the tiles
// [tile_begin, tile_end), in double, rounded once to `dtype`.
//   skew:   (n_blocks, b(b-1)/2), strict upper triangles of the Q, packed row-major
//   drop:   (n_blocks,), true for a block that is to be the identity; null if there is none
//   blocks: (n_blocks, b, b), output
//   dtype:  of skew and blocks
void cayley(const void* skew, const bool* drop, void* blocks, int64_t n_blocks, int64_t b,
            int64_t tile_begin, int64_t tile_end, DType dtype);

// Computes the gradient of `cayley`, in double. With G the gradient of R and
// U = 1/2 (I + R)^T G (I + R)^T it is skew_grad_ij = U_ij - U_ji for i < j, and 0 for a dropped
// block. R is all that is needed from the forward pass.
//   blocks, grad: (n_blocks, b, b), R and G
//   skew_grad:    (n_blocks, b(b-1)/2), output
void cayley_backward(const void* blocks, const bool* drop, const void* grad, void* skew_grad,
                     int64_t n_blocks, int64_t b, int64_t tile_begin, int64_t tile_end,
                     DType dtype);

// Multiplies n butterfly factors to the dense matrices C_{n-1} ... C_0 of one stage, for the groups
// [begin, end). Computed in `dtype`, which is float32 or float64.
//   factors: (n, n_blocks, b, b), where b is even if n > 1
//   stages:  (n_blocks b / size, size, size) with size = b 2^(n-1), output
//   stride:  distance of the chunks that factor 0 mixes, in chunks of b/2 features: a power of two
void compose(const void* factors, void* stages, int64_t n, int64_t n_blocks, int64_t b,
             int64_t stride, int64_t begin, int64_t end, DType dtype);
// Computes the gradient of `compose`. Each group writes the gradients of its own blocks only.
//   grad:         of the stages, shaped like them
//   factors_grad: (n, n_blocks, b, b), output
void compose_backward(const void* factors, const void* grad, void* factors_grad, int64_t n,
                      int64_t n_blocks, int64_t b, int64_t stride, int64_t begin, int64_t end,
                      DType dtype);

// Computes rows [begin, end) of y = x R, where R is block-diagonal over the groups of the stage.
//   x, y:   (rows, d)
//   stages: (d / size, size, size), the matrices as they are applied: transposed for x R^T
//   factor: (rows,), of each row of y, in the dtype of the stages; null stands for ones
//   dtype:  of x and y. The stages have the same dtype, but float32 if it is bfloat16; the products
//           are computed in the dtype of the stages.
void rotate(const void* x, const void* stages, const void* factor, void* y, int64_t d, Stage stage,
            int64_t begin, int64_t end, DType dtype);
// Computes the same with an adapter for each row: row i is multiplied by the matrices of adapter
// index[i]. It is copied if index[i] is -1, and filled with NaN if it is any other number outside
// of [0, n_adapters), since the index is not checked before the kernel runs.
//   stages: (n_adapters, d / size, size, size)
//   index:  (rows,)
void rotate_indexed(const void* x, const void* stages, const int32_t* index, void* y,
                    int64_t n_adapters, int64_t d, Stage stage, int64_t begin, int64_t end,
                    DType dtype);
// Computes the gradients of `rotate` for groups [begin, end), over all rows.
//   grad, x:     (rows, d), the gradient of y, and x
//   stages:      the matrices that grad is multiplied by; unused if x_grad is null
//   x_grad:      (rows, d), output: grad times the stages; null if it is not wanted
//   stages_grad: (d / size, size, size), output in the dtype of the stages: x^T grad of each group,
//                or grad^T x if `transpose`
void rotate_backward(const void* grad, const void* x, const void* stages, void* x_grad,
                     void* stages_grad, int64_t rows, int64_t d, Stage stage, bool transpose,
                     int64_t begin, int64_t end, DType dtype);

// Computes the gradient of the stage of every segment of the rows, for groups [begin, end) of each:
// x^T grad of a group, summed over the rows [offsets[e-1], offsets[e]) of segment e, the first of
// which begins at row 0. Offsets that descend or leave [0, rows] are cut to it, since they are not
// checked before the kernel runs.
//   x, grad:     (rows, d)
//   offsets:     (n_segments,), the end of each segment; rows from the last one on are in none
//   stage_grads: (n_segments, d / size, size, size), output, float32 if `dtype` is bfloat16; zeros
//                for an empty segment
void segment_stage_grads(const void* x, const void* grad, const int32_t* offsets,
                         void* stage_grads, int64_t n_segments, int64_t rows, int64_t d,
                         Stage stage, int64_t begin, int64_t end, DType dtype);

// The next functions compute y = scale * (x R W^T) + bias as one matrix product, in float32, for a
// stage with stride 1. Rows of x are packed in panels of linear_panel() rows. Panels are multiplied
// in blocks of kLinearRows rows. One block times a few outputs is a unit of work.
constexpr int64_t kLinearRows = 512;
// Rows that are packed at a time, so few that the packed rows stay in the last-level cache, more or
// less; a multiple of kLinearRows.
constexpr int64_t kLinearPackedRows = 1024;
// Limit: a packed block of W has this many outputs, and the size of the stage has to divide it, so
// that a unit of work has whole groups.
constexpr int64_t kLinearOutputs = 192;
// Number of rows in a panel; depends on the instruction set.
int64_t linear_panel();
// True if the kernels take a stage of this size, because it divides kLinearOutputs.
bool linear_takes(int64_t size);
// Number of units of work in a product of `rows` rows with `outputs` outputs, if each unit is to
// have whole groups of `size` outputs.
int64_t linear_units(int64_t rows, int64_t outputs, int64_t size);

// Rotates rows and packs them for `linear`: panels [begin, end) of x R.
//   x:      (rows, d)
//   stages: (d / size, size, size)
//   packed: (panels, d, linear_panel()), output; the last panel is padded with zeros
void linear_pack(const float* x, const float* stages, float* packed, int64_t rows, int64_t d,
                 int64_t size, int64_t begin, int64_t end);
// Multiplies the packed rows by W: units [begin, end) of linear_units(rows, n, 1).
//   weight:      (n, d)
//   scale, bias: (n,); null for 1 and for 0
//   center:      (n,), what is added to z: null for 0
//   y:           (rows, n), output
//   z:           (rows, n), output: x R W^T + center, which the gradient of the scale needs; null if
//                it is not wanted
void linear(const float* packed, const float* weight, const float* scale, const float* bias,
            const float* center, float* y, float* z, int64_t rows, int64_t d, int64_t n,
            int64_t begin, int64_t end);

// Packs panels [begin, end) of grad * scale for `linear_backward` and sums their rows.
//   grad:       (rows, n), the gradient of y
//   z:          (rows, n), the output before or after the scale; null if there is no gradient of the
//               scale
//   scale:      (n,); null for 1
//   center:     (n,), what was added to z; null for 0
//   packed:     (panels, n, linear_panel()), output; the last panel is padded with zeros
//   scale_sums: (panels, n), output: sums of grad * (z - center) over the rows of a panel; 0 if z is
//               null
//   bias_sums:  (panels, n), output: sums of grad
void linear_backward_pack(const float* grad, const float* z, const float* scale,
                          const float* center, float* packed, float* scale_sums, float* bias_sums,
                          int64_t rows, int64_t n, int64_t begin, int64_t end);
// Computes the gradients of x and of the stages: units [begin, end) of linear_units(rows, d, size).
//   weight: (n, d);  x: (rows, d)
//   stages: (d / size, size, size), the matrices of R^T
//   x_grad: (rows, d), output
//   grams:  (blocks of kLinearRows rows, d / size, size, size), output: for each block of rows and
//           each group x^T g, g being the gradient of x R. Their sum over the blocks of rows is the
//           gradient of the matrices of R.
void linear_backward(const float* packed, const float* weight, const float* x, const float* stages,
                     float* x_grad, float* grams, int64_t rows, int64_t d, int64_t n, int64_t size,
                     int64_t begin, int64_t end);

// Computes rows [begin, end) of y = scale * x + shift.
//   x, y:         (rows, n) in `dtype`
//   scale, shift: (n,) in `dtype`, but float32 if it is bfloat16
void scale(const void* x, const void* scale, const void* shift, void* y, int64_t n, int64_t begin,
           int64_t end, DType dtype);

// Computes columns [begin, end) of the gradients of y = scale * (x - center) + bias.
//   grad, x:       (rows, n) in `dtype`
//   scale, center: (n,) in `dtype`, but float32 if it is bfloat16; scale is unused without x_grad
//   x_grad:        (rows, n), output: grad * scale; null if it is not wanted
//   scale_grad:    (n,), output: sums of grad * (x - center) over the rows, in the dtype of center
//   bias_grad:     (n,), output: sums of grad, in the dtype of center
void scale_backward(const void* grad, const void* x, const void* scale, const void* center,
                    void* x_grad, void* scale_grad, void* bias_grad, int64_t rows, int64_t n,
                    int64_t begin, int64_t end, DType dtype);

}  // namespace cpu
}  // namespace boft
