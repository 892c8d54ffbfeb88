// y = scale * (x - center) + bias, and its gradients, each in one pass over the rows. The gradients
// of the vectors are written as partial sums over ranges of rows, which a second launch adds up in
// order.
//
// Arguments of the kernels: rows are (rows, n), vectors (n,) in the compute type. A thread has
// Vector neighboring columns, a block of threads `rows_per_block` rows; `across` blocks make up a
// row. `scale_base` is added to the numbers of `scale`.
#pragma once

#include "gpu.cuh"

namespace boft::cuda {

constexpr int kScaleThreads = 128;
// Rows that a thread loads before it stores the first: the compiler may not do so on its own, since
// a result could lie where the next row is read.
constexpr int kScaleAhead = 4;

// Columns of a thread, loaded at once: 16 bytes of them if addresses and n allow it, else one.
template <class T, int Vector>
struct alignas(Vector * sizeof(T)) Columns {
  static_assert(Vector * sizeof(T) <= 16);
  T at[Vector];
};

// Computes y. A center or bias of null is 0; without a bias there is no center. It is computed as
// scale * x + shift with shift = bias - scale * center, which is exactly 0 where scale is 1 and
// center equals bias.
template <class T, int Vector>
__global__ void __launch_bounds__(kScaleThreads, 1)
    scale_kernel(const T* x, const Wide<T>* scale, int scale_base, const Wide<T>* center,
                 const Wide<T>* bias, T* y, int64_t rows, int64_t n, int64_t rows_per_block,
                 int across) {
  using W = Wide<T>;
  const int64_t thread = int64_t(blockIdx.x) % across * kScaleThreads + threadIdx.x;
  const int64_t column = thread * Vector, first = int64_t(blockIdx.x) / across * rows_per_block;
  if (column >= n) return;
  const int64_t last = first + rows_per_block < rows ? first + rows_per_block : rows;
  W scales[Vector], shifts[Vector];
#pragma unroll
  for (int i = 0; i < Vector; ++i) {
    scales[i] = W(scale_base) + scale[column + i];
    shifts[i] = bias == nullptr ? W(0) : bias[column + i];
    if (center != nullptr) shifts[i] -= scales[i] * center[column + i];
  }
  for (int64_t row = first; row < last; row += kScaleAhead) {
    const int64_t at = row * n + column;
    Columns<T, Vector> v[kScaleAhead];
#pragma unroll
    for (int a = 0; a < kScaleAhead; ++a)
      if (row + a < last) v[a] = *reinterpret_cast<const Columns<T, Vector>*>(x + at + a * n);
#pragma unroll
    for (int a = 0; a < kScaleAhead; ++a) {
      if (row + a >= last) continue;
      Columns<T, Vector> out;
#pragma unroll
      for (int i = 0; i < Vector; ++i)
        out.at[i] = narrow<T>(widen(v[a].at[i]) * scales[i] + shifts[i]);
      *reinterpret_cast<Columns<T, Vector>*>(y + at + a * n) = out;
    }
  }
}

// Computes partials (splits, 2, n): for each range of rows the sums of grad * (x - center) and of
// grad. A center of null is 0. If XGrad, it also computes x_grad (rows, n); else scale is unused.
template <class T, int Vector, bool XGrad>
__global__ void __launch_bounds__(kScaleThreads, 1)
    scale_backward_kernel(const T* grad, const T* x, const Wide<T>* scale, int scale_base,
                          const Wide<T>* center, T* x_grad, Wide<T>* partials, int64_t rows,
                          int64_t n, int64_t rows_per_block, int across) {
  using W = Wide<T>;
  const int64_t thread = int64_t(blockIdx.x) % across * kScaleThreads + threadIdx.x;
  const int64_t column = thread * Vector, split = int64_t(blockIdx.x) / across;
  if (column >= n) return;
  const int64_t first = split * rows_per_block;
  const int64_t last = first + rows_per_block < rows ? first + rows_per_block : rows;
  W scales[Vector], centers[Vector], scale_sums[Vector] = {}, bias_sums[Vector] = {};
#pragma unroll
  for (int i = 0; i < Vector; ++i) {
    scales[i] = XGrad ? W(scale_base) + scale[column + i] : W(0);
    centers[i] = center == nullptr ? W(0) : center[column + i];
  }
  for (int64_t row = first; row < last; row += kScaleAhead) {
    const int64_t at = row * n + column;
    Columns<T, Vector> g[kScaleAhead], v[kScaleAhead];
#pragma unroll
    for (int a = 0; a < kScaleAhead; ++a) {
      if (row + a >= last) continue;
      g[a] = *reinterpret_cast<const Columns<T, Vector>*>(grad + at + a * n);
      v[a] = *reinterpret_cast<const Columns<T, Vector>*>(x + at + a * n);
    }
#pragma unroll
    for (int a = 0; a < kScaleAhead; ++a) {
      if (row + a >= last) continue;
      Columns<T, Vector> out;
#pragma unroll
      for (int i = 0; i < Vector; ++i) {
        const W upstream = widen(g[a].at[i]);
        out.at[i] = narrow<T>(upstream * scales[i]);
        scale_sums[i] += upstream * (widen(v[a].at[i]) - centers[i]);
        bias_sums[i] += upstream;
      }
      if constexpr (XGrad) *reinterpret_cast<Columns<T, Vector>*>(x_grad + at + a * n) = out;
    }
  }
#pragma unroll
  for (int i = 0; i < Vector; ++i) {
    partials[split * 2 * n + column + i] = scale_sums[i];
    partials[(split * 2 + 1) * n + column + i] = bias_sums[i];
  }
}

// Adds up partials (splits, 2, n), in the order of the splits.
template <class W>
__global__ void __launch_bounds__(kScaleThreads, 1)
    sum_kernel(const W* partials, W* scale_grad, W* bias_grad, int64_t n, int64_t splits) {
  const int64_t column = int64_t(blockIdx.x) * kScaleThreads + threadIdx.x;
  if (column >= 2 * n) return;
  W sum = 0;
#pragma unroll 8
  for (int64_t split = 0; split < splits; ++split) sum += partials[split * 2 * n + column];
  (column < n ? scale_grad[column] : bias_grad[column - n]) = sum;
}

}  // namespace boft::cuda
