// Product of n butterfly factors as the dense matrices of a stage, group by group, and its
// gradient.
//
// Each group is a small butterfly of its own over `size` features, which are numbered locally here.
// The product of factors 0 .. j-1 is block-diagonal, with dense blocks on subgroups of `width`
// neighboring local features. Factor j joins these subgroups in pairs, so the width doubles with
// each factor. Only the dense blocks are multiplied, never a structural zero.
#include <vector>

#include "boft_kernels.h"
#include "common.h"

namespace boft::cpu {
namespace {

// Sizes as in boft::cpu::compose; `size` is that of the stage.
struct Shape {
  int64_t n, n_blocks, b, stride, size;

  // Index, among the blocks of all factors, of block c of pair a of factor j in group g.
  int64_t block(int64_t g, int64_t j, int64_t a, int64_t c) const {
    const int64_t h = g / stride, l = g % stride;
    return j * n_blocks + (((h << (n - j - 1)) + a) * (stride << j)) + c * stride + l;
  }
};

// Pair a of subgroups that factor j joins. Block (a, c) of the factor mixes chunk c of both
// subgroups: columns of half h of the block are multiplied by rows of the product so far that
// belong to subgroup h, and these are not zero in the columns of subgroup h only.
struct Join {
  int64_t chunk, width, size, first;  // `first` is the first local feature of the pair

  Join(const Shape& s, int64_t j, int64_t a)
      : chunk(s.b / 2), width(chunk << j), size(s.size), first(a * 2 * width) {}
  // Local feature of element e of block c: a row of the product.
  int64_t row(int64_t c, int64_t e) const {
    return first + (e < chunk ? 0 : width) + c * chunk + e % chunk;
  }
  // First column of subgroup h.
  int64_t column(int64_t h) const { return first + h * width; }
};

// Computes to[t] = sum over k < count of factors[k * step] * from[k * stride + t] for t < width, or
// adds that to to[t] if `add`. Columns that fill no vector are left to the next narrower ones.
template <int BYTES, class T>
BOFT_INLINE void combine(const T* factors, int64_t step, const T* from, int64_t stride,
                         int64_t count, T* to, int64_t width, bool add) {
  using V = typename Vector<T, BYTES>::type;
  constexpr int64_t lanes = Vector<T, BYTES>::lanes;
  int64_t t = 0;
  for (; t + lanes <= width; t += lanes) {
    V sum = add ? *reinterpret_cast<const V*>(to + t) : V{};
    for (int64_t k = 0; k < count; ++k)
      sum += factors[k * step] * *reinterpret_cast<const V*>(from + k * stride + t);
    *reinterpret_cast<V*>(to + t) = sum;
  }
  if constexpr (BYTES > 16) {
    if (t < width)
      combine<BYTES / 2>(factors, step, from + t, stride, count, to + t, width - t, add);
  } else {
    for (; t < width; ++t) {
      T sum = add ? to[t] : T(0);
      for (int64_t k = 0; k < count; ++k) sum += factors[k * step] * from[k * stride + t];
      to[t] = sum;
    }
  }
}

// Dot product of `width` numbers, in vectors no wider than that.
template <int BYTES, class T>
BOFT_INLINE T dot(const T* p, const T* q, int64_t width) {
  using V = typename Vector<T, BYTES>::type;
  constexpr int64_t lanes = Vector<T, BYTES>::lanes;
  if constexpr (BYTES > 16)
    if (width < lanes) return dot<BYTES / 2>(p, q, width);
  V sums{};
  int64_t t = 0;
  for (; t + lanes <= width; t += lanes)
    sums += *reinterpret_cast<const V*>(p + t) * *reinterpret_cast<const V*>(q + t);
  T sum = 0;
  for (; t < width; ++t) sum += p[t] * q[t];
  for (int64_t v = 0; v < lanes; ++v) sum += sums[v];
  return sum;
}

// Writes factor 0 of group g to `out` (size, size): its blocks along the diagonal, else zeros.
template <class T>
BOFT_INLINE void start(const T* factors, const Shape& s, int64_t g, T* out) {
  std::memset(out, 0, size_t(s.size * s.size) * sizeof(T));
  for (int64_t a = 0; a < s.size / s.b; ++a) {
    const T* block = factors + s.block(g, 0, a, 0) * s.b * s.b;
    for (int64_t e = 0; e < s.b; ++e)
      std::memcpy(out + (a * s.b + e) * s.size + a * s.b, block + e * s.b, size_t(s.b) * sizeof(T));
  }
}

// Computes out = C_j in, both (size, size), where `in` is the product of the factors before j.
template <int BYTES, class T>
BOFT_INLINE void join(const T* factors, const Shape& s, int64_t g, int64_t j, const T* in, T* out) {
  if (s.size > s.b << j) std::memset(out, 0, size_t(s.size * s.size) * sizeof(T));
  for (int64_t a = 0; a < int64_t(1) << (s.n - j - 1); ++a) {
    const Join pair(s, j, a);
    for (int64_t c = 0; c < int64_t(1) << j; ++c) {
      const T* block = factors + s.block(g, j, a, c) * s.b * s.b;
      for (int64_t h = 0; h < 2; ++h) {
        const T* from = in + pair.row(c, h * pair.chunk) * s.size + pair.column(h);
        for (int64_t e = 0; e < s.b; ++e)
          combine<BYTES>(block + e * s.b + h * pair.chunk, 1, from, s.size, pair.chunk,
                         out + pair.row(c, e) * s.size + pair.column(h), pair.width, false);
      }
    }
  }
}

// Computes the gradients of the product C_j in, from `grad`, that of the product:
// factors_grad, those of the blocks of C_j, which are dot products of rows of `grad` and `in`; and
// in_grad = C_j^T grad, within the dense blocks of `in` only.
template <int BYTES, class T>
BOFT_INLINE void join_backward(const T* factors, const Shape& s, int64_t g, int64_t j, const T* in,
                               const T* grad, T* factors_grad, T* in_grad) {
  for (int64_t a = 0; a < int64_t(1) << (s.n - j - 1); ++a) {
    const Join pair(s, j, a);
    for (int64_t c = 0; c < int64_t(1) << j; ++c) {
      const int64_t at = s.block(g, j, a, c) * s.b * s.b;
      for (int64_t h = 0; h < 2; ++h)
        for (int64_t f = h * pair.chunk; f < (h + 1) * pair.chunk; ++f) {
          const int64_t row = pair.row(c, f) * s.size + pair.column(h);
          for (int64_t e = 0; e < s.b; ++e)
            factors_grad[at + e * s.b + f] = dot<BYTES>(
                grad + pair.row(c, e) * s.size + pair.column(h), in + row, pair.width);
          // The rows that a block mixes are two runs of neighbors.
          for (int64_t run = 0; run < 2; ++run)
            combine<BYTES>(factors + at + run * pair.chunk * s.b + f, s.b,
                           grad + pair.row(c, run * pair.chunk) * s.size + pair.column(h), s.size,
                           pair.chunk, in_grad + row, pair.width, run == 1);
        }
    }
  }
}

// Composes groups [begin, end). `scratch` holds one matrix.
template <int BYTES, class T>
BOFT_INLINE void forward(const T* factors, T* stages, const Shape& s, int64_t begin, int64_t end,
                         T* scratch) {
  const int64_t area = s.size * s.size;
  for (int64_t g = begin; g < end; ++g) {
    // The products go to `stages` and `scratch` in turn, so that the last one is in `stages`.
    T* at = (s.n - 1) % 2 ? scratch : stages + g * area;
    start(factors, s, g, at);
    for (int64_t j = 1; j < s.n; ++j) {
      T* next = at == scratch ? stages + g * area : scratch;
      join<BYTES>(factors, s, g, j, at, next);
      at = next;
    }
  }
}

// Computes the gradients for groups [begin, end). The products of the first j factors, j < n, are
// computed once more here, since the forward pass saves none. `scratch` holds n + 1 matrices: the
// n - 1 products, and two gradients in turn.
template <int BYTES, class T>
BOFT_INLINE void backward(const T* factors, const T* grad, T* factors_grad, const Shape& s,
                          int64_t begin, int64_t end, T* scratch) {
  const int64_t area = s.size * s.size;
  T *products = scratch, *left = products + (s.n - 1) * area, *next = left + area;
  for (int64_t g = begin; g < end; ++g) {
    if (s.n > 1) start(factors, s, g, products);
    for (int64_t j = 1; j + 1 < s.n; ++j)
      join<BYTES>(factors, s, g, j, products + (j - 1) * area, products + j * area);
    const T* upstream = grad + g * area;
    for (int64_t j = s.n - 1; j > 0; --j) {
      join_backward<BYTES>(factors, s, g, j, products + (j - 1) * area, upstream, factors_grad,
                           next);
      T* swap = left;
      upstream = left = next;
      next = swap;
    }
    for (int64_t a = 0; a < s.size / s.b; ++a)
      for (int64_t e = 0; e < s.b; ++e)
        std::memcpy(factors_grad + (s.block(g, 0, a, 0) * s.b + e) * s.b,
                    upstream + (a * s.b + e) * s.size + a * s.b, size_t(s.b) * sizeof(T));
  }
}

#define BOFT_DTYPE(SUFFIX, BYTES, TARGET, T)                                               \
  TARGET void forward_##SUFFIX(const T* factors, T* stages, const Shape& s, int64_t begin, \
                               int64_t end, T* scratch) {                                  \
    forward<BYTES>(factors, stages, s, begin, end, scratch);                               \
  }                                                                                        \
  TARGET void backward_##SUFFIX(const T* factors, const T* grad, T* factors_grad,          \
                                const Shape& s, int64_t begin, int64_t end, T* scratch) {  \
    backward<BYTES>(factors, grad, factors_grad, s, begin, end, scratch);                  \
  }
#define BOFT_DTYPES(SUFFIX, BYTES, TARGET) \
  BOFT_DTYPE(SUFFIX, BYTES, TARGET, float)        \
  BOFT_DTYPE(SUFFIX, BYTES, TARGET, double)
BOFT_ISAS(BOFT_DTYPES)

template <class T>
void compose_as(const void* factors, void* stages, const Shape& s, int64_t begin, int64_t end) {
  std::vector<T> scratch(size_t(s.size * s.size));
  BOFT_RUN(forward, static_cast<const T*>(factors), static_cast<T*>(stages), s, begin, end,
           scratch.data());
}

template <class T>
void backward_as(const void* factors, const void* grad, void* out, const Shape& s, int64_t begin,
                 int64_t end) {
  std::vector<T> scratch(size_t((s.n + 1) * s.size * s.size));
  BOFT_RUN(backward, static_cast<const T*>(factors), static_cast<const T*>(grad),
           static_cast<T*>(out), s, begin, end, scratch.data());
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
