// Rows times block-diagonal stages, and the Gram x^T g of the backward pass. A few rows at a time
// go through all groups, so that x streams through memory once while the matrices stay in cache.
#include <cstring>
#include <vector>

#include "boft_kernels.h"
#include "common.h"

namespace boft::cpu {
namespace {

// Vectors of BYTES bytes: as wide as the instruction set has them. A wider type would compile too,
// but splits into more registers than there are.
template <class T, int BYTES>
struct Vector {
  static constexpr int64_t lanes = BYTES / int64_t(sizeof(T));
  typedef T type __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
};

constexpr int64_t kRows = 4;       // rows whose results are held in registers
constexpr int64_t kGramRows = 16;  // rows that a Gram block is kept in registers for
constexpr int64_t kGramSum = 256;  // rows summed apart, so that rounding grows slower

// Offset of chunk c of group g in a row.
BOFT_INLINE int64_t chunk_at(const Stage& s, int64_t g, int64_t c) {
  const int64_t h = g / s.stride, l = g % s.stride;
  return ((h * (s.size / s.chunk) + c) * s.stride + l) * s.chunk;
}

// The features of a group in one row, side by side: in place if they are neighbours already.
template <class T>
BOFT_INLINE const T* gather(const T* row, const Stage& s, int64_t g, T* buffer) {
  if (s.stride == 1) return row + g * s.size;
  for (int64_t c = 0; c < s.size / s.chunk; ++c)
    for (int64_t e = 0; e < s.chunk; ++e) buffer[c * s.chunk + e] = row[chunk_at(s, g, c) + e];
  return buffer;
}

template <class T>
BOFT_INLINE void scatter(const T* buffer, const Stage& s, int64_t g, T* row) {
  for (int64_t c = 0; c < s.size / s.chunk; ++c)
    for (int64_t e = 0; e < s.chunk; ++e) row[chunk_at(s, g, c) + e] = buffer[c * s.chunk + e];
}

// out[i] = in[i] matrix for i < ROWS; `size` columns, in vectors and then one by one.
template <int BYTES, int64_t ROWS, class T>
BOFT_INLINE void multiply(const T* const* in, const T* matrix, T* const* out, int64_t size) {
  using V = typename Vector<T, BYTES>::type;
  constexpr int64_t lanes = Vector<T, BYTES>::lanes;
  int64_t j = 0;
  for (; j + lanes <= size; j += lanes) {
    V sums[ROWS] = {};
    for (int64_t k = 0; k < size; ++k) {
      const V row = *reinterpret_cast<const V*>(matrix + k * size + j);
      for (int64_t i = 0; i < ROWS; ++i) sums[i] += in[i][k] * row;
    }
    for (int64_t i = 0; i < ROWS; ++i) *reinterpret_cast<V*>(out[i] + j) = sums[i];
  }
  for (; j < size; ++j)
    for (int64_t i = 0; i < ROWS; ++i) {
      T sum = 0;
      for (int64_t k = 0; k < size; ++k) sum += in[i][k] * matrix[k * size + j];
      out[i][j] = sum;
    }
}

template <int BYTES, int64_t ROWS, class T>
BOFT_INLINE void rotate_rows(const T* x, const T* stages, T* y, int64_t d, const Stage& s,
                             T* buffer) {
  const T* in[ROWS];
  T* out[ROWS];
  for (int64_t g = 0; g < d / s.size; ++g) {
    for (int64_t i = 0; i < ROWS; ++i) {
      in[i] = gather(x + i * d, s, g, buffer + i * s.size);
      out[i] = s.stride == 1 ? y + i * d + g * s.size : buffer + (ROWS + i) * s.size;
    }
    multiply<BYTES, ROWS>(in, stages + g * s.size * s.size, out, s.size);
    if (s.stride != 1)
      for (int64_t i = 0; i < ROWS; ++i) scatter(out[i], s, g, y + i * d);
  }
}

// SIZE is that of the stage if it is known when compiling, else 0.
template <int BYTES, int64_t SIZE, class T>
BOFT_INLINE void rotate_all(const T* x, const T* stages, T* y, int64_t d, Stage s, int64_t begin,
                            int64_t end, T* buffer) {
  if (SIZE) s.size = SIZE;
  int64_t n = begin;
  for (; n + kRows <= end; n += kRows)
    rotate_rows<BYTES, kRows>(x + n * d, stages, y + n * d, d, s, buffer);
  for (; n < end; ++n) rotate_rows<BYTES, 1>(x + n * d, stages, y + n * d, d, s, buffer);
}

// out += x^T g over `rows` rows of one group, `lanes` columns of it in registers at a time.
template <int BYTES, int64_t SIZE, class T>
BOFT_INLINE void gram_block(const T* const* x, const T* const* grad, T* out, int64_t rows,
                            int64_t size) {
  using V = typename Vector<T, BYTES>::type;
  constexpr int64_t lanes = Vector<T, BYTES>::lanes, block = SIZE == 4 ? 4 : 8;
  int64_t j = 0;
  for (; j + lanes <= size; j += lanes) {
    int64_t k = 0;
    for (; k + block <= size; k += block) {
      V sums[block];
      for (int64_t i = 0; i < block; ++i)
        sums[i] = *reinterpret_cast<const V*>(out + (k + i) * size + j);
      for (int64_t n = 0; n < rows; ++n) {
        const V row = *reinterpret_cast<const V*>(grad[n] + j);
        for (int64_t i = 0; i < block; ++i) sums[i] += x[n][k + i] * row;
      }
      for (int64_t i = 0; i < block; ++i)
        *reinterpret_cast<V*>(out + (k + i) * size + j) = sums[i];
    }
    for (; k < size; ++k) {
      V sum = *reinterpret_cast<const V*>(out + k * size + j);
      for (int64_t n = 0; n < rows; ++n)
        sum += x[n][k] * *reinterpret_cast<const V*>(grad[n] + j);
      *reinterpret_cast<V*>(out + k * size + j) = sum;
    }
  }
  for (; j < size; ++j)
    for (int64_t k = 0; k < size; ++k) {
      T sum = out[k * size + j];
      for (int64_t n = 0; n < rows; ++n) sum += x[n][k] * grad[n][j];
      out[k * size + j] = sum;
    }
}

template <int BYTES, int64_t SIZE, class T>
BOFT_INLINE void gram_all(const T* x, const T* grad, T* out, int64_t rows, int64_t d, Stage s,
                          int64_t begin, int64_t end, T* buffer) {
  if (SIZE) s.size = SIZE;
  const int64_t area = s.size * s.size, total = (end - begin) * area;
  T* sums = buffer + 2 * kGramRows * s.size;
  std::memset(out + begin * area, 0, size_t(total) * sizeof(T));
  const T *left[kGramRows], *right[kGramRows];
  for (int64_t top = 0; top < rows; top += kGramSum) {
    const int64_t bottom = rows - top < kGramSum ? rows : top + kGramSum;
    std::memset(sums, 0, size_t(total) * sizeof(T));
    for (int64_t n = top; n < bottom; n += kGramRows) {
      const int64_t count = bottom - n < kGramRows ? bottom - n : kGramRows;
      for (int64_t g = begin; g < end; ++g) {
        for (int64_t i = 0; i < count; ++i) {
          left[i] = gather(x + (n + i) * d, s, g, buffer + 2 * i * s.size);
          right[i] = gather(grad + (n + i) * d, s, g, buffer + (2 * i + 1) * s.size);
        }
        gram_block<BYTES, SIZE>(left, right, sums + (g - begin) * area, count, s.size);
      }
    }
    for (int64_t i = 0; i < total; ++i) out[begin * area + i] += sums[i];
  }
}

// The widest vector, of at most BYTES bytes, that `size` numbers of T fill.
template <class T>
constexpr int fitting(int bytes, int64_t size) {
  return size * int64_t(sizeof(T)) < bytes ? int(size * int64_t(sizeof(T))) : bytes;
}

#define BOFT_SIZE(FUNCTION, T, BYTES, SIZE, ...) \
  case SIZE: return FUNCTION<fitting<T>(BYTES, SIZE), SIZE>(__VA_ARGS__);
#define BOFT_SIZES(FUNCTION, T, BYTES, ...)            \
  switch (s.size) {                                    \
    BOFT_SIZE(FUNCTION, T, BYTES, 4, __VA_ARGS__)      \
    BOFT_SIZE(FUNCTION, T, BYTES, 8, __VA_ARGS__)      \
    BOFT_SIZE(FUNCTION, T, BYTES, 16, __VA_ARGS__)     \
    BOFT_SIZE(FUNCTION, T, BYTES, 32, __VA_ARGS__)     \
    default: return FUNCTION<BYTES, 0>(__VA_ARGS__);   \
  }
#define BOFT_KERNELS(SUFFIX, BYTES, TARGET, T)                                                  \
  TARGET void rotate_##SUFFIX(const T* x, const T* stages, T* y, int64_t d, const Stage& s,     \
                              int64_t begin, int64_t end, T* buffer) {                          \
    BOFT_SIZES(rotate_all, T, BYTES, x, stages, y, d, s, begin, end, buffer)                    \
  }                                                                                             \
  TARGET void gram_##SUFFIX(const T* x, const T* grad, T* out, int64_t rows, int64_t d,         \
                            const Stage& s, int64_t begin, int64_t end, T* buffer) {            \
    BOFT_SIZES(gram_all, T, BYTES, x, grad, out, rows, d, s, begin, end, buffer)                \
  }
#define BOFT_BASELINE
BOFT_KERNELS(baseline, 16, BOFT_BASELINE, float)
BOFT_KERNELS(baseline, 16, BOFT_BASELINE, double)
#if defined(__x86_64__) && defined(__GNUC__)
BOFT_KERNELS(avx2, 32, __attribute__((target("avx2,fma"))), float)
BOFT_KERNELS(avx2, 32, __attribute__((target("avx2,fma"))), double)
BOFT_KERNELS(avx512, 64, __attribute__((target("avx512f"))), float)
BOFT_KERNELS(avx512, 64, __attribute__((target("avx512f"))), double)
#endif

template <class T>
void rotate_as(const void* x_, const void* stages_, void* y_, int64_t d, const Stage& s,
               int64_t begin, int64_t end) {
  std::vector<T> buffer(size_t(2 * kRows * s.size));
  const auto *x = static_cast<const T*>(x_), *stages = static_cast<const T*>(stages_);
  auto* y = static_cast<T*>(y_);
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f"))
    return rotate_avx512(x, stages, y, d, s, begin, end, buffer.data());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return rotate_avx2(x, stages, y, d, s, begin, end, buffer.data());
#endif
  rotate_baseline(x, stages, y, d, s, begin, end, buffer.data());
}

template <class T>
void gram_as(const void* x_, const void* grad_, void* out_, int64_t rows, int64_t d, const Stage& s,
             int64_t begin, int64_t end) {
  std::vector<T> buffer(size_t(2 * kGramRows * s.size + (end - begin) * s.size * s.size));
  const auto *x = static_cast<const T*>(x_), *grad = static_cast<const T*>(grad_);
  auto* out = static_cast<T*>(out_);
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f"))
    return gram_avx512(x, grad, out, rows, d, s, begin, end, buffer.data());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return gram_avx2(x, grad, out, rows, d, s, begin, end, buffer.data());
#endif
  gram_baseline(x, grad, out, rows, d, s, begin, end, buffer.data());
}

}  // namespace

void rotate(const void* x, const void* stages, void* y, int64_t d, Stage stage, int64_t begin,
            int64_t end, DType dtype) {
  if (dtype == DType::F64) return rotate_as<double>(x, stages, y, d, stage, begin, end);
  rotate_as<float>(x, stages, y, d, stage, begin, end);
}

void gram(const void* x, const void* grad, void* out, int64_t rows, int64_t d, Stage stage,
          int64_t begin, int64_t end, DType dtype) {
  if (dtype == DType::F64) return gram_as<double>(x, grad, out, rows, d, stage, begin, end);
  gram_as<float>(x, grad, out, rows, d, stage, begin, end);
}

}  // namespace boft::cpu
