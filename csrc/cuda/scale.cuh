// Gradients of y = scale * (x - center) + bias for rows x, in one pass over them: partial sums of ranges
// of rows, which a second launch adds up in order.
#pragma once

#include "gpu.cuh"

namespace boft::cuda {

constexpr int kScaleThreads = 128;

// Columns that a thread has: 16 bytes of them, where addresses allow it.
template <class T, int Vector>
__global__ void __launch_bounds__(kScaleThreads, 1)
    scale_backward_kernel(const T* grad, const T* x, const Wide<T>* scale, const Wide<T>* center,
                          T* x_grad, Wide<T>* partials, int64_t rows, int64_t n,
                          int64_t rows_per_block, int across) {
  using W = Wide<T>;
  static_assert(Vector * sizeof(T) <= 16);
  struct alignas(Vector * sizeof(T)) Columns {
    T at[Vector];
  };
  const int64_t thread = int64_t(blockIdx.x) % across * kScaleThreads + threadIdx.x;
  const int64_t column = thread * Vector, split = int64_t(blockIdx.x) / across;
  if (column >= n) return;
  const int64_t first = split * rows_per_block;
  const int64_t last = first + rows_per_block < rows ? first + rows_per_block : rows;
  W scales[Vector], centers[Vector], scale_sums[Vector] = {}, bias_sums[Vector] = {};
#pragma unroll
  for (int i = 0; i < Vector; ++i)
    scales[i] = scale[column + i], centers[i] = center[column + i];
#pragma unroll 4
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = row * n + column;
    const Columns g = *reinterpret_cast<const Columns*>(grad + at);
    const Columns v = *reinterpret_cast<const Columns*>(x + at);
    Columns out;
#pragma unroll
    for (int i = 0; i < Vector; ++i) {
      const W upstream = widen(g.at[i]);
      out.at[i] = narrow<T>(upstream * scales[i]);
      scale_sums[i] += upstream * (widen(v.at[i]) - centers[i]);
      bias_sums[i] += upstream;
    }
    *reinterpret_cast<Columns*>(x_grad + at) = out;
  }
#pragma unroll
  for (int i = 0; i < Vector; ++i) {
    partials[split * 2 * n + column + i] = scale_sums[i];
    partials[(split * 2 + 1) * n + column + i] = bias_sums[i];
  }
}

// sums (2, n) of partials (splits, 2, n).
template <class W>
__global__ void __launch_bounds__(kScaleThreads, 1)
    sum_kernel(const W* partials, W* scale_grad, W* bias_grad, int64_t n, int64_t splits) {
  const int64_t column = int64_t(blockIdx.x) * kScaleThreads + threadIdx.x;
  if (column >= 2 * n) return;
  W sum = 0;
  for (int64_t split = 0; split < splits; ++split) sum += partials[split * 2 * n + column];
  (column < n ? scale_grad[column] : bias_grad[column - n]) = sum;
}

}  // namespace boft::cuda
