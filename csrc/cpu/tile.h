// Products of a few rows with one stage matrix: rows times the matrix, and left^T right summed over
// the rows ("Gram"), which is the gradient of the matrix. cpu/rotate.cpp and cpu/linear.cpp are
// built from them. All work on the `size` features of one group.
//
// A result is held in vector registers while its sum runs, because loads and stores of partial sums
// would cost more than the multiply-adds. Template parameters fix how many registers that takes:
// BYTES is the width of a vector, ROWS the number of rows of the result.
//
// Arguments: row i of a tile begins at in + i * in_stride (in numbers); its features are neighbors.
// A matrix is (size, size), row-major, without gaps. T is the type that is computed in.
#pragma once

#include "common.h"

namespace boft::cpu {

constexpr int64_t kRows = 8;  // rows of a result that are held in registers at a time

// Computes out[i] = in[i] * matrix for i < ROWS, for VECTORS vectors of neighboring columns:
// `matrix` and `out` point to the first of them. The sums take ROWS * VECTORS registers.
template <int BYTES, int64_t ROWS, int64_t VECTORS, class T>
BOFT_INLINE void multiply_columns(const T* in, int64_t in_stride, const T* matrix, T* out,
                                  int64_t out_stride, int64_t size) {
  using V = typename Vector<T, BYTES>::type;
  constexpr int64_t lanes = Vector<T, BYTES>::lanes;
  V sums[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < size; ++k) {
    V row[VECTORS];
    for (int64_t v = 0; v < VECTORS; ++v)
      row[v] = *reinterpret_cast<const V*>(matrix + k * size + v * lanes);
    for (int64_t i = 0; i < ROWS; ++i) {
      const T factor = in[i * in_stride + k];
      for (int64_t v = 0; v < VECTORS; ++v) sums[i][v] += factor * row[v];
    }
  }
  for (int64_t i = 0; i < ROWS; ++i)
    for (int64_t v = 0; v < VECTORS; ++v)
      *reinterpret_cast<V*>(out + i * out_stride + v * lanes) = sums[i][v];
}

// Computes out[i] = in[i] * matrix for i < ROWS, for all `size` columns: as many as possible in
// vectors, the rest one by one.
template <int BYTES, int64_t ROWS, class T>
BOFT_INLINE void multiply_rows(const T* in, int64_t in_stride, const T* matrix, T* out,
                               int64_t out_stride, int64_t size) {
  constexpr int64_t lanes = Vector<T, BYTES>::lanes;
  int64_t j = 0;
  if (BYTES >= 64)  // AVX-512 has 32 registers: enough for two vectors of each row
    for (; j + 2 * lanes <= size; j += 2 * lanes)
      multiply_columns<BYTES, ROWS, 2>(in, in_stride, matrix + j, out + j, out_stride, size);
  for (; j + lanes <= size; j += lanes)
    multiply_columns<BYTES, ROWS, 1>(in, in_stride, matrix + j, out + j, out_stride, size);
  for (; j < size; ++j)
    for (int64_t i = 0; i < ROWS; ++i) {
      T sum = 0;
      for (int64_t k = 0; k < size; ++k) sum += in[i * in_stride + k] * matrix[k * size + j];
      out[i * out_stride + j] = sum;
    }
}

// Computes out[i] = in[i] * matrix for i < rows, kRows of them at a time. `out` may not be `in`.
template <int BYTES, class T>
BOFT_INLINE void multiply(const T* in, int64_t in_stride, const T* matrix, T* out,
                          int64_t out_stride, int64_t rows, int64_t size) {
  int64_t n = 0;
  for (; n + kRows <= rows; n += kRows)
    multiply_rows<BYTES, kRows>(in + n * in_stride, in_stride, matrix, out + n * out_stride,
                                out_stride, size);
  for (; n < rows; ++n)
    multiply_rows<BYTES, 1>(in + n * in_stride, in_stride, matrix, out + n * out_stride,
                            out_stride, size);
}

// Adds sum over n < rows of left[n][k] * right[n][j] to out[k][j], for ROWS features k of `left`
// and one vector of features j of `right`. ROWS registers hold the sums.
template <int BYTES, int64_t ROWS, class T>
BOFT_INLINE void gram_rows(const T* left, int64_t left_stride, const T* right,
                           int64_t right_stride, T* out, int64_t rows, int64_t size) {
  using V = typename Vector<T, BYTES>::type;
  V sums[ROWS];
  for (int64_t i = 0; i < ROWS; ++i) sums[i] = *reinterpret_cast<const V*>(out + i * size);
  for (int64_t n = 0; n < rows; ++n) {
    const V row = *reinterpret_cast<const V*>(right + n * right_stride);
    for (int64_t i = 0; i < ROWS; ++i) sums[i] += left[n * left_stride + i] * row;
  }
  for (int64_t i = 0; i < ROWS; ++i) *reinterpret_cast<V*>(out + i * size) = sums[i];
}

// Adds left^T right, summed over `rows` rows, to out (size, size). SIZE is `size` if it is known at
// compile time, else 0. Feature k of `left` becomes row k of the result.
template <int BYTES, int64_t SIZE, class T>
BOFT_INLINE void gram_tile(const T* left, int64_t left_stride, const T* right,
                           int64_t right_stride, T* out, int64_t rows, int64_t size) {
  constexpr int64_t lanes = Vector<T, BYTES>::lanes;
  constexpr int64_t most = BYTES >= 64 ? 16 : 8, block = SIZE && SIZE < most ? SIZE : most;
  int64_t j = 0;
  for (; j + lanes <= size; j += lanes) {
    int64_t k = 0;
    for (; k + block <= size; k += block)
      gram_rows<BYTES, block>(left + k, left_stride, right + j, right_stride, out + k * size + j,
                              rows, size);
    for (; k < size; ++k)
      gram_rows<BYTES, 1>(left + k, left_stride, right + j, right_stride, out + k * size + j, rows,
                          size);
  }
  for (; j < size; ++j)
    for (int64_t k = 0; k < size; ++k) {
      T sum = out[k * size + j];
      for (int64_t n = 0; n < rows; ++n)
        sum += left[n * left_stride + k] * right[n * right_stride + j];
      out[k * size + j] = sum;
    }
}

}  // namespace boft::cpu
