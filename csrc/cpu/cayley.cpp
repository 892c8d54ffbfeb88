// Cayley transform of batched small skew-symmetric blocks, vectorised ACROSS blocks: a tile holds
// element (i, j) of kTile blocks side by side, so that b = 2, 4, 8 fill the vector lanes as well as
// b = 64 does. Computed in double throughout: the blocks are tiny beside the activations, and one
// rounding at the end makes R orthogonal to float32's last bit for |Q| up to 1e12.
#include <cstring>
#include <vector>

#include "boft_kernels.h"
#include "common.h"

namespace boft::cpu {
namespace {

using bf16 = uint16_t;

template <class T>
BOFT_INLINE double widen(T value) {
  return double(value);
}
template <>
BOFT_INLINE double widen<bf16>(bf16 value) {
  const uint32_t bits = uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return double(result);
}

template <class T>
BOFT_INLINE T narrow(double value) {
  return T(value);
}
template <>
BOFT_INLINE bf16 narrow<bf16>(double value) {
  // Rounding twice (double to float to bf16) is right unless the first step makes a tie: round the
  // first step to odd, which no later rounding can mistake for a tie.
  float rounded = float(value);
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40);  // NaN stays NaN
  if (double(rounded) != value && (bits & 1) == 0) {
    const bool away = (double(rounded) > value) == (value > 0);  // |rounded| > |value|
    bits += away ? uint32_t(-1) : 1u;
  }
  return bf16((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// a[(i * b + j) * kTile + v] is element (i, j) of block v of the tile
BOFT_INLINE double* at(double* a, int64_t b, int64_t i, int64_t j) {
  return a + (i * b + j) * kTile;
}

// In-place Gauss-Jordan inverse without pivoting. The symmetric part of A = I - Q is I, and stays
// at least I in every Schur complement, so that no pivot is ever below 1.
BOFT_INLINE void invert(double* a, int64_t b) {
  for (int64_t k = 0; k < b; ++k) {
    double* pivot = at(a, b, k, k);
    double inverse[kTile];
    for (int v = 0; v < kTile; ++v) {
      inverse[v] = 1.0 / pivot[v];
      pivot[v] = 1.0;
    }
    double* row = at(a, b, k, 0);
    for (int64_t j = 0; j < b; ++j)
      for (int v = 0; v < kTile; ++v) row[j * kTile + v] *= inverse[v];
    for (int64_t i = 0; i < b; ++i) {
      if (i == k) continue;
      double factor[kTile];
      double* column = at(a, b, i, k);
      for (int v = 0; v < kTile; ++v) {
        factor[v] = column[v];
        column[v] = 0.0;
      }
      double* target = at(a, b, i, 0);
      for (int64_t j = 0; j < b; ++j)
        for (int v = 0; v < kTile; ++v)
          target[j * kTile + v] -= factor[v] * row[j * kTile + v];
    }
  }
}

template <class T>
BOFT_INLINE void forward_tile(const T* skew, T* blocks, int64_t count, int64_t b, double* a) {
  const int64_t packed = b * (b - 1) / 2;
  for (int64_t i = 0, p = 0; i < b; ++i) {
    for (int v = 0; v < kTile; ++v) at(a, b, i, i)[v] = 1.0;
    for (int64_t j = i + 1; j < b; ++j, ++p)
      for (int v = 0; v < kTile; ++v) {
        const double q = v < count ? widen(skew[v * packed + p]) : 0.0;
        at(a, b, i, j)[v] = -q;
        at(a, b, j, i)[v] = q;
      }
  }
  invert(a, b);
  for (int64_t v = 0; v < count; ++v)
    for (int64_t i = 0; i < b; ++i)
      for (int64_t j = 0; j < b; ++j)
        blocks[(v * b + i) * b + j] = narrow<T>(2.0 * at(a, b, i, j)[v] - (i == j ? 1.0 : 0.0));
}

template <class T>
BOFT_INLINE void backward_tile(const T* blocks, const T* grad, T* skew_grad, int64_t count,
                               int64_t b, double* h) {
  const int64_t packed = b * (b - 1) / 2, size = b * b * kTile;
  double *g = h + size, *t = g + size, *u = t + size;
  for (int64_t i = 0; i < b; ++i)
    for (int64_t j = 0; j < b; ++j)
      for (int v = 0; v < kTile; ++v) {
        const int64_t from = (v * b + i) * b + j;
        at(h, b, j, i)[v] = v < count ? 0.5 * widen(blocks[from]) + (i == j ? 0.5 : 0.0) : 0.0;
        at(g, b, i, j)[v] = v < count ? widen(grad[from]) : 0.0;
      }
  // h = 1/2 (I + R)^T, t = h G, u = 2 t h
  for (int64_t step = 0; step < 2; ++step) {
    double *left = step ? t : h, *right = step ? h : g, *out = step ? u : t;
    for (int64_t i = 0; i < size; ++i) out[i] = 0.0;
    for (int64_t i = 0; i < b; ++i)
      for (int64_t k = 0; k < b; ++k) {
        const double *factor = at(left, b, i, k), *row = at(right, b, k, 0);
        double* target = at(out, b, i, 0);
        for (int64_t j = 0; j < b; ++j)
          for (int v = 0; v < kTile; ++v)
            target[j * kTile + v] += factor[v] * row[j * kTile + v];
      }
  }
  for (int64_t v = 0; v < count; ++v)
    for (int64_t i = 0, p = 0; i < b; ++i)
      for (int64_t j = i + 1; j < b; ++j, ++p)
        skew_grad[v * packed + p] = narrow<T>(2.0 * (at(u, b, i, j)[v] - at(u, b, j, i)[v]));
}

// All tiles of a range. B is the block size, or 0 for one that is known at run time only.
template <int64_t B, class T>
BOFT_INLINE void forward_tiles(const T* skew, T* blocks, int64_t n, int64_t b_, int64_t begin,
                               int64_t end, double* scratch) {
  const int64_t b = B ? B : b_;
  for (int64_t first = begin * kTile; first < end * kTile && first < n; first += kTile) {
    const int64_t count = n - first < kTile ? n - first : kTile;
    forward_tile(skew + first * (b * (b - 1) / 2), blocks + first * b * b, count, b, scratch);
  }
}

template <int64_t B, class T>
BOFT_INLINE void backward_tiles(const T* blocks, const T* grad, T* skew_grad, int64_t n, int64_t b_,
                                int64_t begin, int64_t end, double* scratch) {
  const int64_t b = B ? B : b_;
  for (int64_t first = begin * kTile; first < end * kTile && first < n; first += kTile) {
    const int64_t count = n - first < kTile ? n - first : kTile;
    backward_tile(blocks + first * b * b, grad + first * b * b,
                  skew_grad + first * (b * (b - 1) / 2), count, b, scratch);
  }
}

// target_clones takes no templates: one function per dtype, with loops of constant length for the
// common block sizes.
#define BOFT_SIZES(TILES, ...)                   \
  switch (b) {                                   \
    case 2: return TILES<2>(__VA_ARGS__);        \
    case 4: return TILES<4>(__VA_ARGS__);        \
    case 8: return TILES<8>(__VA_ARGS__);        \
    case 16: return TILES<16>(__VA_ARGS__);      \
    default: return TILES<0>(__VA_ARGS__);       \
  }
#define BOFT_DTYPE(T)                                                                            \
  BOFT_CLONES void forward(const T* skew, T* blocks, int64_t n, int64_t b, int64_t begin,        \
                           int64_t end, double* scratch) {                                       \
    BOFT_SIZES(forward_tiles, skew, blocks, n, b, begin, end, scratch)                           \
  }                                                                                              \
  BOFT_CLONES void backward(const T* blocks, const T* grad, T* skew_grad, int64_t n, int64_t b,  \
                            int64_t begin, int64_t end, double* scratch) {                       \
    BOFT_SIZES(backward_tiles, blocks, grad, skew_grad, n, b, begin, end, scratch)               \
  }
BOFT_DTYPE(float)
BOFT_DTYPE(double)
BOFT_DTYPE(bf16)
#undef BOFT_DTYPE
#undef BOFT_SIZES

}  // namespace

const char* isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return "avx512";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "baseline";
}

void cayley(const void* skew, void* blocks, int64_t n, int64_t b, int64_t begin, int64_t end,
            DType dtype) {
  std::vector<double> a(size_t(b * b * kTile));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    forward(static_cast<const T*>(skew), static_cast<T*>(blocks), n, b, begin, end, a.data());
  };
  switch (dtype) {
    case DType::F32: return run(float());
    case DType::F64: return run(double());
    case DType::BF16: return run(bf16());
  }
}

void cayley_backward(const void* blocks, const void* grad, void* skew_grad, int64_t n, int64_t b,
                     int64_t begin, int64_t end, DType dtype) {
  std::vector<double> a(size_t(4 * b * b * kTile));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    backward(static_cast<const T*>(blocks), static_cast<const T*>(grad), static_cast<T*>(skew_grad),
             n, b, begin, end, a.data());
  };
  switch (dtype) {
    case DType::F32: return run(float());
    case DType::F64: return run(double());
    case DType::BF16: return run(bf16());
  }
}

}  // namespace boft::cpu
