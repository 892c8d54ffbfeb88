// Gradients of y = x * scale + shift in one pass over the rows.
#include <cstring>

#include "boft_kernels.h"
#include "common.h"

namespace boft::cpu {
namespace {

constexpr int64_t kColumns = 512;  // whose sums stay in the first-level cache
constexpr int64_t kRows = 64;      // summed apart and then added, so that rounding grows slower

template <class T>
BOFT_INLINE void backward(const T* __restrict grad, const T* __restrict x, const T* __restrict scale,
                          T* __restrict x_grad, T* __restrict scale_grad, T* __restrict shift_grad,
                          int64_t rows, int64_t n, int64_t begin, int64_t end) {
  std::memset(scale_grad + begin, 0, size_t(end - begin) * sizeof(T));
  std::memset(shift_grad + begin, 0, size_t(end - begin) * sizeof(T));
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t last = first + kColumns < end ? first + kColumns : end;
    for (int64_t top = 0; top < rows; top += kRows) {
      const int64_t bottom = top + kRows < rows ? top + kRows : rows;
      T scale_sum[kColumns] = {}, shift_sum[kColumns] = {};
      for (int64_t i = top; i < bottom; ++i)
        for (int64_t j = first; j < last; ++j) {
          const T g = grad[i * n + j];
          x_grad[i * n + j] = g * scale[j];
          scale_sum[j - first] += g * x[i * n + j];
          shift_sum[j - first] += g;
        }
      for (int64_t j = first; j < last; ++j) {
        scale_grad[j] += scale_sum[j - first];
        shift_grad[j] += shift_sum[j - first];
      }
    }
  }
}

#define BOFT_DTYPE(T)                                                                          \
  BOFT_CLONES void run(const T* grad, const T* x, const T* scale, T* x_grad, T* scale_grad,    \
                       T* shift_grad, int64_t rows, int64_t n, int64_t begin, int64_t end) {   \
    backward(grad, x, scale, x_grad, scale_grad, shift_grad, rows, n, begin, end);             \
  }
BOFT_DTYPE(float)
BOFT_DTYPE(double)
#undef BOFT_DTYPE

}  // namespace

void scale_backward(const void* grad, const void* x, const void* scale, void* x_grad,
                    void* scale_grad, void* shift_grad, int64_t rows, int64_t n, int64_t begin,
                    int64_t end, DType dtype) {
  const auto as = [&](auto zero) {
    using T = decltype(zero);
    run(static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<const T*>(scale),
        static_cast<T*>(x_grad), static_cast<T*>(scale_grad), static_cast<T*>(shift_grad), rows, n,
        begin, end);
  };
  if (dtype == DType::F64) return as(double());
  as(float());
}

}  // namespace boft::cpu
