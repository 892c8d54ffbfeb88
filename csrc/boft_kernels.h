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

}  // namespace cpu
}  // namespace boft
