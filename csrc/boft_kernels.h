// The kernels' own interface: raw pointers and sizes. Neither this header nor any kernel file
// includes torch; csrc/binding.cpp alone translates between the two.
#pragma once

#include <cstdint>

namespace boft {

enum class DType : int { F32, F64, BF16 };

namespace cpu {

// The instruction set that this machine's kernels run on.
const char* isa();

// Blocks are handled in tiles of this many, one per vector lane.
constexpr int64_t kTile = 8;

// Cayley transform R = (I + Q)(I - Q)^-1 of the blocks of tiles [tile_begin, tile_end).
//   skew:   (n_blocks, b(b-1)/2) packed strict upper triangles, row-major
//   blocks: (n_blocks, b, b)
// Any split of the tiles over threads gives the same bits.
void cayley(const void* skew, void* blocks, int64_t n_blocks, int64_t b, int64_t tile_begin,
            int64_t tile_end, DType dtype);

// Its gradient: U = 1/2 (I + R)^T G (I + R)^T, skew_grad_ij = U_ij - U_ji for i < j.
//   blocks, grad: (n_blocks, b, b);  skew_grad: (n_blocks, b(b-1)/2)
void cayley_backward(const void* blocks, const void* grad, void* skew_grad, int64_t n_blocks,
                     int64_t b, int64_t tile_begin, int64_t tile_end, DType dtype);

// Where the features of a stage's dense blocks lie. Group g of the size x size blocks holds chunks
// `stride` apart: with h = g div stride and l = g mod stride, element (c, e) of it is feature
// ((h * size / chunk + c) * stride + l) * chunk + e.
struct Stage {
  int64_t size, chunk, stride;
};

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
void rotate(const void* x, const void* stages, void* y, int64_t d, Stage stage, int64_t begin,
            int64_t end, DType dtype);
// Groups [begin, end) of x^T g: (d / size, size, size), the sum over all rows.
void gram(const void* x, const void* grad, void* out, int64_t rows, int64_t d, Stage stage,
          int64_t begin, int64_t end, DType dtype);

// Columns [begin, end) of the gradients of y = scale * (x - center) + bias, from grad (rows, n):
//   x_grad = grad * scale, and the column sums scale_grad of grad * (x - center), bias_grad of grad
// float32 or float64.
void scale_backward(const void* grad, const void* x, const void* scale, const void* center,
                    void* x_grad, void* scale_grad, void* bias_grad, int64_t rows, int64_t n,
                    int64_t begin, int64_t end, DType dtype);

}  // namespace cpu
}  // namespace boft
