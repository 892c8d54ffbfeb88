// The kernels' own interface: raw pointers and sizes. Neither this header nor any kernel file
// includes torch; csrc/binding* translate between the two.
#pragma once

#include <atomic>
#include <cstdint>

namespace boft {

enum class DType : int { F32, F64, BF16 };

// Where the features of a stage's dense blocks lie. Group g of the size x size blocks holds chunks
// `stride` apart: with h = g div stride and l = g mod stride, element (c, e) of it is feature
// ((h * size / chunk + c) * stride + l) * chunk + e.
struct Stage {
  int64_t size, chunk, stride;
};

namespace cpu {

// The instruction set that this machine's kernels run on.
const char* isa();

// How work is cut, for the whole process (docs/tuning.md): never in which order numbers are added,
// so that results do not depend on them.
struct Tunables {
  std::atomic<int64_t> grain;           // multiply-adds that a thread is to get at least
  std::atomic<int64_t> linear_outputs;  // of one packed block of the weight; a multiple of 192
  std::atomic<int64_t> linear_rows;     // packed at a time; a multiple of kLinearRows
};
Tunables& tunables();
// By its name; null if there is none.
std::atomic<int64_t>* tunable(const char* name);
// Whether it may have this value.
bool is_allowed(const char* name, int64_t value);
// How many items of so many multiply-adds each make 1 / share of the grain; at least 1.
int64_t grain_of(int64_t work, int64_t share = 1);

// Blocks are handled in tiles of this many, one per vector lane.
constexpr int64_t kTile = 8;

// Cayley transform R = (I + Q)(I - Q)^-1 of the blocks of tiles [tile_begin, tile_end).
//   skew:   (n_blocks, b(b-1)/2) packed strict upper triangles, row-major
//   drop:   (n_blocks,), true for blocks that are to be the identity; or null
//   blocks: (n_blocks, b, b)
// Any split of the tiles over threads gives the same bits.
void cayley(const void* skew, const bool* drop, void* blocks, int64_t n_blocks, int64_t b,
            int64_t tile_begin, int64_t tile_end, DType dtype);

// Its gradient: U = 1/2 (I + R)^T G (I + R)^T, skew_grad_ij = U_ij - U_ji for i < j; 0 for blocks
// that were dropped.
//   blocks, grad: (n_blocks, b, b);  skew_grad: (n_blocks, b(b-1)/2)
void cayley_backward(const void* blocks, const bool* drop, const void* grad, void* skew_grad,
                     int64_t n_blocks, int64_t b, int64_t tile_begin, int64_t tile_end,
                     DType dtype);

// Stage matrices of the groups [begin, end): the product C_{n-1} ... C_0 of n butterfly factors,
// the first of which has the given stride (in chunks of b/2 features).
//   factors: (n, n_blocks, b, b) -> stages: (n_blocks b / size, size, size), size = b 2^(n-1)
// float32 or float64, computed in the same type.
void compose(const void* factors, void* stages, int64_t n, int64_t n_blocks, int64_t b,
             int64_t stride, int64_t begin, int64_t end, DType dtype);
// Its gradient: (n, n_blocks, b, b) from that of the stages. Each group writes its own blocks.
void compose_backward(const void* factors, const void* grad, void* factors_grad, int64_t n,
                      int64_t n_blocks, int64_t b, int64_t stride, int64_t begin, int64_t end,
                      DType dtype);

// Rows [begin, end) of y = x R, R block-diagonal over groups; x and y are (rows, d).
//   stages: (d / size, size, size), as they are to be applied: transpose them for x R^T
// float32, float64, or bfloat16 with float32 stages, in which it is computed then.
void rotate(const void* x, const void* stages, void* y, int64_t d, Stage stage, int64_t begin,
            int64_t end, DType dtype);
// The same with one set of stages for each row: stages are (n_adapters, d / size, size, size), and
// row i takes those of index[i], or is copied where that is -1. Any other index gives NaN.
void rotate_indexed(const void* x, const void* stages, const int32_t* index, void* y,
                    int64_t n_adapters, int64_t d, Stage stage, int64_t begin, int64_t end,
                    DType dtype);
// Groups [begin, end) of the gradients of `rotate`: x_grad = grad stages, unless it is null, and the Gram x^T
// grad (grad^T x if `transpose`) over all rows, in the dtype of the stages.
void rotate_backward(const void* grad, const void* x, const void* stages, void* x_grad,
                     void* stages_grad, int64_t rows, int64_t d, Stage stage, bool transpose,
                     int64_t begin, int64_t end, DType dtype);

// y = scale * (x R W^T) + bias as one matrix product, float32, for a stage with stride 1.
// Tokens are handled in panels of linear_panel() rows, and those in blocks of kLinearRows; a block
// times some of the outputs is a unit of work. Any split of panels or units gives the same bits.
constexpr int64_t kLinearRows = 512;
constexpr int64_t kLinearOutputs = 192;  // of which a packed block of the weight has a multiple
int64_t linear_panel();
// Whether a stage of this size has a kernel.
bool linear_takes(int64_t size);
int64_t linear_units(int64_t rows, int64_t outputs, int64_t size);

// Panels [begin, end) of x R, as `linear` reads them.
//   x: (rows, d);  stages: (d / size, size, size);  packed: d times the rows of all panels
void linear_pack(const float* x, const float* stages, float* packed, int64_t rows, int64_t d,
                 int64_t size, int64_t begin, int64_t end);
// Units [begin, end) of linear_units(rows, n, 1).
//   weight: (n, d);  scale, bias: (n,) or null;  y: (rows, n);  z: x R W^T, (rows, n), or null
void linear(const float* packed, const float* weight, const float* scale, const float* bias,
            float* y, float* z, int64_t rows, int64_t d, int64_t n, int64_t begin, int64_t end);

// Panels [begin, end) of grad * scale and, for each of them, the sums over its rows.
//   grad: (rows, n);  z: the same or null;  scale: (n,) or null
//   scale_sums, bias_sums: (panels, n), sums of grad * z and of grad
void linear_backward_pack(const float* grad, const float* z, const float* scale, float* packed,
                          float* scale_sums, float* bias_sums, int64_t rows, int64_t n,
                          int64_t begin, int64_t end);
// Units [begin, end) of linear_units(rows, d, size) of the gradients of x and of the stages.
//   stages: R^T, (d / size, size, size);  grams: (blocks of rows, d / size, size, size)
void linear_backward(const float* packed, const float* weight, const float* x, const float* stages,
                     float* x_grad, float* grams, int64_t rows, int64_t d, int64_t n, int64_t size,
                     int64_t begin, int64_t end);

// Rows [begin, end) of y = scale * x + shift, x: (rows, n). Types as below.
void scale(const void* x, const void* scale, const void* shift, void* y, int64_t n, int64_t begin,
           int64_t end, DType dtype);

// Columns [begin, end) of the gradients of y = scale * (x - center) + bias, from grad (rows, n):
//   x_grad = grad * scale, and the column sums scale_grad of grad * (x - center), bias_grad of grad
// float32, float64, or bfloat16 with float32 scale, center and sums.
void scale_backward(const void* grad, const void* x, const void* scale, const void* center,
                    void* x_grad, void* scale_grad, void* bias_grad, int64_t rows, int64_t n,
                    int64_t begin, int64_t end, DType dtype);

}  // namespace cpu
}  // namespace boft
