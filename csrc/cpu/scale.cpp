// Gradients of y = scale * (x - center) + bias in one pass over the rows.
#include "boft_kernels.h"
#include "common.h"

namespace boft::cpu {
namespace {

constexpr int64_t kColumns = 512;  // whose sums stay in the first-level cache
constexpr int64_t kRows = 64;      // summed in T, then added in double: rounding does not grow

template <class T>
BOFT_INLINE void backward(const T* __restrict grad, const T* __restrict x,
                          const T* __restrict scale, const T* __restrict center,
                          T* __restrict x_grad, T* __restrict scale_grad, T* __restrict bias_grad,
                          int64_t rows, int64_t n, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t last = first + kColumns < end ? first + kColumns : end;
    double scale_total[kColumns] = {}, bias_total[kColumns] = {};
    for (int64_t top = 0; top < rows; top += kRows) {
      const int64_t bottom = top + kRows < rows ? top + kRows : rows;
      T scale_sum[kColumns] = {}, bias_sum[kColumns] = {};
      for (int64_t i = top; i < bottom; ++i)
        for (int64_t j = first; j < last; ++j) {
          const T g = grad[i * n + j];
          x_grad[i * n + j] = g * scale[j];
          scale_sum[j - first] += g * (x[i * n + j] - center[j]);
          bias_sum[j - first] += g;
        }
      for (int64_t j = 0; j < last - first; ++j) {
        scale_total[j] += double(scale_sum[j]);
        bias_total[j] += double(bias_sum[j]);
      }
    }
    for (int64_t j = first; j < last; ++j) {
      scale_grad[j] = T(scale_total[j - first]);
      bias_grad[j] = T(bias_total[j - first]);
    }
  }
}

#define BOFT_DTYPE(T)                                                                           \
  BOFT_CLONES void run(const T* grad, const T* x, const T* scale, const T* center, T* x_grad,   \
                       T* scale_grad, T* bias_grad, int64_t rows, int64_t n, int64_t begin,     \
                       int64_t end) {                                                           \
    backward(grad, x, scale, center, x_grad, scale_grad, bias_grad, rows, n, begin, end);       \
  }
BOFT_DTYPE(float)
BOFT_DTYPE(double)
#undef BOFT_DTYPE

}  // namespace

void scale_backward(const void* grad, const void* x, const void* scale, const void* center,
                    void* x_grad, void* scale_grad, void* bias_grad, int64_t rows, int64_t n,
                    int64_t begin, int64_t end, DType dtype) {
  const auto as = [&](auto zero) {
    using T = decltype(zero);
    run(static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<const T*>(scale),
        static_cast<const T*>(center), static_cast<T*>(x_grad), static_cast<T*>(scale_grad),
        static_cast<T*>(bias_grad), rows, n, begin, end);
  };
  if (dtype == DType::F64) return as(double());
  as(float());
}

}  // namespace boft::cpu
