// Transposition in registers of a square of floats as wide as a vector.
#pragma once

#include "common.h"

// Picks elements of vectors A and B by number; GCC takes the numbers as a vector of type MASK.
#if defined(__clang__)
#define BOFT_SHUFFLE(A, B, MASK, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define BOFT_SHUFFLE(A, B, MASK, ...) __builtin_shuffle(A, B, (MASK){__VA_ARGS__})
#endif

namespace boft::cpu {

typedef int32_t Mask4 __attribute__((vector_size(16)));
typedef int32_t Mask8 __attribute__((vector_size(32)));
typedef int32_t Mask16 __attribute__((vector_size(64)));

// Interleaves a and b: `a` becomes a0 b0 a1 b1 ... from their lower halves, `b` the same from their
// upper halves.
template <int BYTES, class V = typename Vector<float, BYTES>::value>
BOFT_INLINE void interleave(V& a, V& b) {
  const V x = a, y = b;
  if constexpr (BYTES == 64) {
    a = BOFT_SHUFFLE(x, y, Mask16, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    b = BOFT_SHUFFLE(x, y, Mask16, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (BYTES == 32) {
    a = BOFT_SHUFFLE(x, y, Mask8, 0, 8, 1, 9, 2, 10, 3, 11);
    b = BOFT_SHUFFLE(x, y, Mask8, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    a = BOFT_SHUFFLE(x, y, Mask4, 0, 4, 1, 5);
    b = BOFT_SHUFFLE(x, y, Mask4, 2, 6, 3, 7);
  }
}

// Writes out[j][i] = in[i][j] for j < lanes and i < ROWS <= lanes; strides are in numbers. A row of
// `out` is written as a whole vector, with zeros behind its ROWS numbers. If out_stride is less
// than a vector, each row overwrites the zeros of the row before it, so `out` needs room behind its
// last row.
template <int BYTES, int64_t ROWS>
BOFT_INLINE void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  using V = typename Vector<float, BYTES>::value;
  using Memory = typename Vector<float, BYTES>::type;
  constexpr int64_t lanes = Vector<float, BYTES>::lanes;
  static_assert(ROWS <= lanes);
  V rows[lanes];
  for (int64_t i = 0; i < lanes; ++i)
    rows[i] = i < ROWS ? *reinterpret_cast<const Memory*>(in + i * in_stride) : V{};
  // To interleave row i with row i + lanes/2 moves the highest bit of an element's row number to
  // the low end of its column number, and the highest bit of that to the low end of the row number.
  // After log2(lanes) rounds the two numbers have been exchanged.
  for (int64_t step = 1; step < lanes; step *= 2) {
    V next[lanes];
    for (int64_t i = 0; i < lanes / 2; ++i) {
      next[2 * i] = rows[i], next[2 * i + 1] = rows[i + lanes / 2];
      interleave<BYTES>(next[2 * i], next[2 * i + 1]);
    }
    for (int64_t i = 0; i < lanes; ++i) rows[i] = next[i];
  }
  for (int64_t j = 0; j < lanes; ++j) *reinterpret_cast<Memory*>(out + j * out_stride) = rows[j];
}

}  // namespace boft::cpu
