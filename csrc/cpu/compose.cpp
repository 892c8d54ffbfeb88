// Butterfly factors -> dense stage matrices, group by group. A group of n factors is its own small
// butterfly of `size` features: everything happens in a scratch of a few size x size matrices.
#include <cstring>
#include <vector>

#include "boft_kernels.h"
#include "common.h"

namespace boft::cpu {
namespace {

struct Shape {
  int64_t n, n_blocks, b, stride, size;

  // Global index of local block (a, c) of factor j in group g.
  int64_t block(int64_t g, int64_t j, int64_t a, int64_t c) const {
    const int64_t h = g / stride, l = g % stride;
    return j * n_blocks + (((h << (n - j - 1)) + a) * (stride << j)) + c * stride + l;
  }
  // Local feature of element e of local block (a, c) of factor j.
  int64_t feature(int64_t j, int64_t a, int64_t c, int64_t e) const {
    const int64_t r = b / 2;
    return ((a << (j + 1)) + c + (e / r << j)) * r + e % r;
  }
};

// out = C_j in, the rows of `in` being the features; out = C_j^T in if transposed.
template <bool transposed, class T>
BOFT_INLINE void apply(const T* factors, const Shape& s, int64_t g, int64_t j, const T* in,
                       T* out) {
  for (int64_t a = 0; a < int64_t(1) << (s.n - j - 1); ++a)
    for (int64_t c = 0; c < int64_t(1) << j; ++c) {
      const T* block = factors + s.block(g, j, a, c) * s.b * s.b;
      for (int64_t e = 0; e < s.b; ++e) {
        T* target = out + s.feature(j, a, c, e) * s.size;
        std::memset(target, 0, size_t(s.size) * sizeof(T));
        for (int64_t f = 0; f < s.b; ++f) {
          const T factor = transposed ? block[f * s.b + e] : block[e * s.b + f];
          const T* row = in + s.feature(j, a, c, f) * s.size;
          for (int64_t t = 0; t < s.size; ++t) target[t] += factor * row[t];
        }
      }
    }
}

template <class T>
BOFT_INLINE void identity(T* out, int64_t size) {
  std::memset(out, 0, size_t(size * size) * sizeof(T));
  for (int64_t i = 0; i < size; ++i) out[i * size + i] = T(1);
}

template <class T>
BOFT_INLINE void forward(const T* factors, T* stages, const Shape& s, int64_t begin, int64_t end,
                         T* scratch) {
  const int64_t area = s.size * s.size;
  for (int64_t g = begin; g < end; ++g) {
    T *from = scratch, *to = scratch + area;
    identity(from, s.size);
    for (int64_t j = 0; j < s.n; ++j) {
      apply<false>(factors, s, g, j, from, j == s.n - 1 ? stages + g * area : to);
      T* next = from;
      from = to;
      to = next;
    }
  }
}

template <class T>
BOFT_INLINE void backward(const T* factors, const T* grad, T* factors_grad, const Shape& s,
                          int64_t begin, int64_t end, T* scratch) {
  const int64_t area = s.size * s.size;
  T *left = scratch + s.n * area, *next = left + area;
  for (int64_t g = begin; g < end; ++g) {
    // scratch[j] = C_{j-1} ... C_0, what factor j multiplies
    identity(scratch, s.size);
    for (int64_t j = 0; j + 1 < s.n; ++j)
      apply<false>(factors, s, g, j, scratch + j * area, scratch + (j + 1) * area);
    // left = (C_{n-1} ... C_{j+1})^T dR
    std::memcpy(left, grad + g * area, size_t(area) * sizeof(T));
    for (int64_t j = s.n - 1; j >= 0; --j) {
      const T* right = scratch + j * area;
      for (int64_t a = 0; a < int64_t(1) << (s.n - j - 1); ++a)
        for (int64_t c = 0; c < int64_t(1) << j; ++c) {
          T* out = factors_grad + s.block(g, j, a, c) * s.b * s.b;
          for (int64_t e = 0; e < s.b; ++e)
            for (int64_t f = 0; f < s.b; ++f) {
              const T *p = left + s.feature(j, a, c, e) * s.size,
                      *q = right + s.feature(j, a, c, f) * s.size;
              // partial sums side by side: an order that vectorises, the same on every machine
              T sums[8] = {};
              int64_t t = 0;
              for (; t + 8 <= s.size; t += 8)
                for (int64_t v = 0; v < 8; ++v) sums[v] += p[t + v] * q[t + v];
              for (; t < s.size; ++t) sums[0] += p[t] * q[t];
              out[e * s.b + f] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) +
                                 ((sums[4] + sums[5]) + (sums[6] + sums[7]));
            }
        }
      if (j > 0) {
        apply<true>(factors, s, g, j, left, next);
        T* swap = left;
        left = next;
        next = swap;
      }
    }
  }
}

// target_clones takes no templates
#define BOFT_DTYPE(T)                                                                             \
  BOFT_CLONES void run(const T* factors, T* stages, const Shape& s, int64_t begin, int64_t end,   \
                       T* scratch) {                                                              \
    forward(factors, stages, s, begin, end, scratch);                                             \
  }                                                                                               \
  BOFT_CLONES void run_backward(const T* factors, const T* grad, T* factors_grad, const Shape& s, \
                                int64_t begin, int64_t end, T* scratch) {                         \
    backward(factors, grad, factors_grad, s, begin, end, scratch);                                \
  }
BOFT_DTYPE(float)
BOFT_DTYPE(double)
#undef BOFT_DTYPE

template <class T>
void compose_as(const void* factors, void* stages, const Shape& s, int64_t begin, int64_t end) {
  std::vector<T> scratch(size_t(2 * s.size * s.size));
  run(static_cast<const T*>(factors), static_cast<T*>(stages), s, begin, end, scratch.data());
}

template <class T>
void backward_as(const void* factors, const void* grad, void* out, const Shape& s, int64_t begin,
                 int64_t end) {
  std::vector<T> scratch(size_t((s.n + 2) * s.size * s.size));
  run_backward(static_cast<const T*>(factors), static_cast<const T*>(grad), static_cast<T*>(out), s,
               begin, end, scratch.data());
}

}  // namespace

void compose(const void* factors, void* stages, int64_t n, int64_t n_blocks, int64_t b,
             int64_t stride, int64_t begin, int64_t end, DType dtype) {
  const Shape s{n, n_blocks, b, stride, b << (n - 1)};
  if (dtype == DType::F64) return compose_as<double>(factors, stages, s, begin, end);
  compose_as<float>(factors, stages, s, begin, end);
}

void compose_backward(const void* factors, const void* grad, void* factors_grad, int64_t n,
                      int64_t n_blocks, int64_t b, int64_t stride, int64_t begin, int64_t end,
                      DType dtype) {
  const Shape s{n, n_blocks, b, stride, b << (n - 1)};
  if (dtype == DType::F64) return backward_as<double>(factors, grad, factors_grad, s, begin, end);
  backward_as<float>(factors, grad, factors_grad, s, begin, end);
}

}  // namespace boft::cpu
