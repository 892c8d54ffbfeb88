// y = scale * x + shift, and the gradients of y = scale * (x - center) + bias, each in one pass
// over the rows.
#include <type_traits>

#include "boft_kernels.h"
#include "common.h"

namespace boft::cpu {
namespace {

constexpr int64_t kColumns = 512;  // columns at a time: their sums stay in the first-level cache
constexpr int64_t kRows = 64;      // rows summed in C before the sums are added up in double, so
                                   // that rounding errors do not grow with the number of rows

// Rows [begin, end) of y, which may be x. __restrict lets the compiler use vectors.
template <class T, class C = Compute<T>>
BOFT_INLINE void forward(const T* x, const C* __restrict scale, const C* __restrict shift, T* y,
                         int64_t n, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < n; ++j)
      y[i * n + j] = narrow<T>(widen(x[i * n + j]) * scale[j] + shift[j]);
}

// Columns [begin, end) of the gradients, over all rows; that of x if X_GRAD.
template <bool X_GRAD, class T, class C = Compute<T>>
BOFT_INLINE void backward(const T* __restrict grad, const T* __restrict x,
                          const C* __restrict scale, const C* __restrict center,
                          T* __restrict x_grad, C* __restrict scale_grad, C* __restrict bias_grad,
                          int64_t rows, int64_t n, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t last = first + kColumns < end ? first + kColumns : end;
    double scale_total[kColumns] = {}, bias_total[kColumns] = {};
    for (int64_t top = 0; top < rows; top += kRows) {
      const int64_t bottom = top + kRows < rows ? top + kRows : rows;
      C scale_sum[kColumns] = {}, bias_sum[kColumns] = {};
      for (int64_t i = top; i < bottom; ++i)
        for (int64_t j = first; j < last; ++j) {
          const C g = widen(grad[i * n + j]);
          if (X_GRAD) x_grad[i * n + j] = narrow<T>(g * scale[j]);
          scale_sum[j - first] += g * (widen(x[i * n + j]) - center[j]);
          bias_sum[j - first] += g;
        }
      for (int64_t j = 0; j < last - first; ++j) {
        scale_total[j] += double(scale_sum[j]);
        bias_total[j] += double(bias_sum[j]);
      }
    }
    for (int64_t j = first; j < last; ++j) {
      scale_grad[j] = C(scale_total[j - first]);
      bias_grad[j] = C(bias_total[j - first]);
    }
  }
}

#define BOFT_DTYPE(SUFFIX, TARGET, T)                                                          \
  TARGET void forward_##SUFFIX(const T* x, const Compute<T>* scale, const Compute<T>* shift,   \
                               T* y, int64_t n, int64_t begin, int64_t end) {                  \
    forward(x, scale, shift, y, n, begin, end);                                                \
  }                                                                                            \
  TARGET void backward_##SUFFIX(const T* grad, const T* x, const Compute<T>* scale,            \
                                const Compute<T>* center, T* x_grad, Compute<T>* scale_grad,   \
                                Compute<T>* bias_grad, int64_t rows, int64_t n, int64_t begin, \
                                int64_t end) {                                                 \
    if (x_grad)                                                                                \
      backward<true>(grad, x, scale, center, x_grad, scale_grad, bias_grad, rows, n, begin,    \
                     end);                                                                     \
    else                                                                                       \
      backward<false>(grad, x, scale, center, x_grad, scale_grad, bias_grad, rows, n, begin,   \
                      end);                                                                    \
  }
#define BOFT_DTYPES(SUFFIX, BYTES, TARGET) \
  BOFT_DTYPE(SUFFIX, TARGET, float)        \
  BOFT_DTYPE(SUFFIX, TARGET, double)       \
  BOFT_DTYPE(SUFFIX, TARGET, bf16)
BOFT_ISAS(BOFT_DTYPES)

// Calls f with a null pointer to the element type that `dtype` stands for.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::F32: return f(static_cast<float*>(nullptr));
    case DType::F64: return f(static_cast<double*>(nullptr));
    case DType::BF16: return f(static_cast<bf16*>(nullptr));
  }
}

}  // namespace

void scale(const void* x, const void* scale, const void* shift, void* y, int64_t n, int64_t begin,
           int64_t end, DType dtype) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = Compute<T>;
    BOFT_RUN(forward, static_cast<const T*>(x), static_cast<const C*>(scale),
             static_cast<const C*>(shift), static_cast<T*>(y), n, begin, end);
  });
}

void scale_backward(const void* grad, const void* x, const void* scale, const void* center,
                    void* x_grad, void* scale_grad, void* bias_grad, int64_t rows, int64_t n,
                    int64_t begin, int64_t end, DType dtype) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = Compute<T>;
    BOFT_RUN(backward, static_cast<const T*>(grad), static_cast<const T*>(x),
             static_cast<const C*>(scale), static_cast<const C*>(center), static_cast<T*>(x_grad),
             static_cast<C*>(scale_grad), static_cast<C*>(bias_grad), rows, n, begin, end);
  });
}

}  // namespace boft::cpu
