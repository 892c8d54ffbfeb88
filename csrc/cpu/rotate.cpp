// Rows times the block-diagonal matrix of a stage, and the gradients. A few rows at a time go
// through all groups, so that x is read from memory once while the matrices stay in cache.
#include <algorithm>
#include <limits>
#include <vector>

#include "boft_kernels.h"
#include "common.h"
#include "tile.h"

namespace boft::cpu {
namespace {

constexpr int64_t kGramRows = 16;  // rows summed while a part of x^T g stays in registers
constexpr int64_t kGramSum = 256;  // rows summed apart, so that rounding errors grow slower
constexpr int64_t kGramBytes = 16384;  // bytes of sums at a time: they stay in the L1 cache

// First feature of group g; its chunks follow `stride` chunks apart.
BOFT_INLINE int64_t group_at(const Stage& s, int64_t g) {
  return (g / s.stride * (s.size / s.chunk) * s.stride + g % s.stride) * s.chunk;
}

// Rows of one group as tile.h takes them: features side by side, in the compute type; rows `stride`
// numbers apart.
template <class C>
struct Tile {
  C* data;
  int64_t stride;
};

// True if rows of x are such a tile already: neighboring features in the compute type.
template <class T, class C = Compute<T>>
constexpr bool in_place(const Stage& s) {
  return sizeof(T) == sizeof(C) && s.stride == 1;
}

// Copies `rows` rows of group g from x (rows, d) to buffer (rows, s.size). CHUNK is the stage's
// chunk if it is known at compile time, so that it moves as one vector, else 0.
template <int64_t CHUNK, class T, class C>
BOFT_INLINE void gather_chunks(const T* x, int64_t d, Stage s, int64_t g, int64_t rows, C* buffer) {
  if (CHUNK) s.chunk = CHUNK;
  const T* from = x + group_at(s, g);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < s.size / s.chunk; ++c)
      for (int64_t e = 0; e < s.chunk; ++e)
        buffer[i * s.size + c * s.chunk + e] = widen(from[i * d + c * s.stride * s.chunk + e]);
}

// Copies a buffer back to rows of group g: the opposite of gather_chunks().
template <int64_t CHUNK, class T, class C>
BOFT_INLINE void scatter_chunks(T* y, int64_t d, Stage s, int64_t g, int64_t rows,
                                const C* buffer) {
  if (CHUNK) s.chunk = CHUNK;
  T* to = y + group_at(s, g);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < s.size / s.chunk; ++c)
      for (int64_t e = 0; e < s.chunk; ++e)
        to[i * d + c * s.stride * s.chunk + e] = narrow<T>(buffer[i * s.size + c * s.chunk + e]);
}

#define BOFT_CHUNKS(FUNCTION, ...)                    \
  switch (s.chunk) {                                  \
    case 2: FUNCTION<2>(__VA_ARGS__); break;          \
    case 4: FUNCTION<4>(__VA_ARGS__); break;          \
    case 8: FUNCTION<8>(__VA_ARGS__); break;          \
    default: FUNCTION<0>(__VA_ARGS__);                \
  }

// Rows of group g of x as a tile: in place if possible, else copied to `buffer`.
template <class T, class C = Compute<T>>
BOFT_INLINE Tile<const C> gather(const T* x, int64_t d, const Stage& s, int64_t g, int64_t rows,
                                 C* buffer) {
  if (in_place<T>(s)) return {reinterpret_cast<const C*>(x) + g * s.size, d};
  BOFT_CHUNKS(gather_chunks, x, d, s, g, rows, buffer)
  return {buffer, s.size};
}

// Tile for results of group g of y: in y itself if possible, else `buffer`, from which scatter()
// copies them to y.
template <class T, class C = Compute<T>>
BOFT_INLINE Tile<C> target(T* y, int64_t d, const Stage& s, int64_t g, C* buffer) {
  if (in_place<T>(s)) return {reinterpret_cast<C*>(y) + g * s.size, d};
  return {buffer, s.size};
}

template <class T, class C = Compute<T>>
BOFT_INLINE void scatter(T* y, int64_t d, const Stage& s, int64_t g, int64_t rows,
                         const C* buffer) {
  if (in_place<T>(s)) return;
  BOFT_CHUNKS(scatter_chunks, y, d, s, g, rows, buffer)
}

// Rotates rows [begin, end), and multiplies each by its factor if FACTOR. SIZE is the size of the
// stage if it is known at compile time, else 0; `buffer` holds two tiles of kRows rows.
template <int BYTES, int64_t SIZE, bool FACTOR = false, class T, class C = Compute<T>>
BOFT_INLINE void rotate_all(const T* x, const C* stages, T* y, int64_t d, Stage s, int64_t begin,
                            int64_t end, C* buffer, const C* factor = nullptr) {
  if (SIZE) s.size = SIZE;
  for (int64_t n = begin; n < end; n += kRows) {
    const int64_t rows = end - n < kRows ? end - n : kRows;
    for (int64_t g = 0; g < d / s.size; ++g) {
      const Tile<const C> in = gather(x + n * d, d, s, g, rows, buffer);
      const Tile<C> out = target(y + n * d, d, s, g, buffer + kRows * s.size);
      multiply<BYTES>(in.data, in.stride, stages + g * s.size * s.size, out.data, out.stride, rows,
                      s.size);
      for (int64_t i = 0; FACTOR && i < rows; ++i)  // while they are in the first-level cache
        for (int64_t e = 0; e < s.size; ++e) out.data[i * out.stride + e] *= factor[n + i];
      scatter(y + n * d, d, s, g, rows, out.data);
    }
  }
}

// Number of groups whose sums stay in the first-level cache.
template <class C>
constexpr int64_t groups_at_once(int64_t size) {
  const int64_t fitting = kGramBytes / (size * size * int64_t(sizeof(C)));
  return fitting < 1 ? 1 : fitting;
}

// Computes stages_grad for groups [begin, end) and, unless x_grad is null, x_grad = grad times the
// matrices; arguments as in rotate_backward. kGramSum rows of a few groups are summed in `sums` and
// then added to stages_grad. `buffer` holds three tiles of kGramRows rows, and `sums`.
template <int BYTES, int64_t SIZE, class T, class C = Compute<T>>
BOFT_INLINE void backward_all(const T* grad, const T* x, const C* stages, T* x_grad, C* stages_grad,
                              int64_t rows, int64_t d, Stage s, bool transpose, int64_t begin,
                              int64_t end, C* buffer) {
  if (SIZE) s.size = SIZE;
  const int64_t area = s.size * s.size, block = groups_at_once<C>(s.size);
  C *x_tile = buffer, *grad_tile = x_tile + kGramRows * s.size;
  C *out_tile = grad_tile + kGramRows * s.size, *sums = out_tile + kGramRows * s.size;
  std::memset(stages_grad + begin * area, 0, size_t((end - begin) * area) * sizeof(C));
  for (int64_t top = 0; top < rows; top += kGramSum) {
    const int64_t bottom = rows - top < kGramSum ? rows : top + kGramSum;
    for (int64_t first = begin; first < end; first += block) {
      const int64_t last = end - first < block ? end : first + block;
      const int64_t total = (last - first) * area;
      std::memset(sums, 0, size_t(total) * sizeof(C));
      for (int64_t n = top; n < bottom; n += kGramRows) {
        const int64_t count = bottom - n < kGramRows ? bottom - n : kGramRows;
        for (int64_t g = first; g < last; ++g) {
          const Tile<const C> a = gather(x + n * d, d, s, g, count, x_tile);
          const Tile<const C> b = gather(grad + n * d, d, s, g, count, grad_tile);
          const Tile<const C>&left = transpose ? b : a, &right = transpose ? a : b;
          gram_tile<BYTES, SIZE>(left.data, left.stride, right.data, right.stride,
                                 sums + (g - first) * area, count, s.size);
          if (!x_grad) continue;
          const Tile<C> out = target(x_grad + n * d, d, s, g, out_tile);
          multiply<BYTES>(b.data, b.stride, stages + g * area, out.data, out.stride, count,
                          s.size);
          scatter(x_grad + n * d, d, s, g, count, out.data);
        }
      }
      for (int64_t i = 0; i < total; ++i) stages_grad[first * area + i] += sums[i];
    }
  }
}

#define BOFT_SIZE(FUNCTION, C, BYTES, SIZE, ...) \
  case SIZE: return FUNCTION<fitting<C>(BYTES, SIZE), SIZE>(__VA_ARGS__);
#define BOFT_SIZES(FUNCTION, C, BYTES, ...)          \
  switch (s.size) {                                  \
    BOFT_SIZE(FUNCTION, C, BYTES, 4, __VA_ARGS__)    \
    BOFT_SIZE(FUNCTION, C, BYTES, 8, __VA_ARGS__)    \
    BOFT_SIZE(FUNCTION, C, BYTES, 16, __VA_ARGS__)   \
    BOFT_SIZE(FUNCTION, C, BYTES, 32, __VA_ARGS__)   \
    default: return FUNCTION<BYTES, 0>(__VA_ARGS__); \
  }
#define BOFT_DTYPE(SUFFIX, BYTES, TARGET, T, C)                                                   \
  TARGET void rotate_##SUFFIX(const T* x, const C* stages, T* y, int64_t d, const Stage& s,       \
                              int64_t begin, int64_t end, C* buffer) {                            \
    BOFT_SIZES(rotate_all, C, BYTES, x, stages, y, d, s, begin, end, buffer)                      \
  }                                                                                               \
  /* A function of its own, as even an unused factor makes rotate_ slower. */                     \
  TARGET void rotate_scaled_##SUFFIX(const T* x, const C* stages, T* y, int64_t d,                \
                                     const Stage& s, int64_t begin, int64_t end, C* buffer,       \
                                     const C* factor) {                                           \
    rotate_all<BYTES, 0, true>(x, stages, y, d, s, begin, end, buffer, factor);                   \
  }                                                                                               \
  TARGET void backward_##SUFFIX(const T* grad, const T* x, const C* stages, T* x_grad,            \
                                C* stages_grad, int64_t rows, int64_t d, const Stage& s,          \
                                bool transpose, int64_t begin, int64_t end, C* buffer) {          \
    BOFT_SIZES(backward_all, C, BYTES, grad, x, stages, x_grad, stages_grad, rows, d, s,          \
               transpose, begin, end, buffer)                                                     \
  }
#define BOFT_DTYPES(SUFFIX, BYTES, TARGET)          \
  BOFT_DTYPE(SUFFIX, BYTES, TARGET, float, float)   \
  BOFT_DTYPE(SUFFIX, BYTES, TARGET, double, double) \
  BOFT_DTYPE(SUFFIX, BYTES, TARGET, bf16, float)
BOFT_ISAS(BOFT_DTYPES)

template <class T>
void rotate_as(const void* x, const void* stages, const void* factor, void* y, int64_t d,
               const Stage& s, int64_t begin, int64_t end) {
  using C = Compute<T>;
  std::vector<C> buffer(size_t(2 * kRows * s.size));
  if (factor) {
    BOFT_RUN(rotate_scaled, static_cast<const T*>(x), static_cast<const C*>(stages),
             static_cast<T*>(y), d, s, begin, end, buffer.data(), static_cast<const C*>(factor));
  } else {
    BOFT_RUN(rotate, static_cast<const T*>(x), static_cast<const C*>(stages), static_cast<T*>(y),
             d, s, begin, end, buffer.data());
  }
}

template <class T>
void backward_as(const void* grad, const void* x, const void* stages, void* x_grad,
                 void* stages_grad, int64_t rows, int64_t d, const Stage& s, bool transpose,
                 int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t sums = groups_at_once<C>(s.size) * s.size * s.size;
  std::vector<C> buffer(size_t(3 * kGramRows * s.size + sums));
  BOFT_RUN(backward, static_cast<const T*>(grad), static_cast<const T*>(x),
           static_cast<const C*>(stages), static_cast<T*>(x_grad), static_cast<C*>(stages_grad),
           rows, d, s, transpose, begin, end, buffer.data());
}

}  // namespace

void rotate(const void* x, const void* stages, const void* factor, void* y, int64_t d, Stage stage,
            int64_t begin, int64_t end, DType dtype) {
  switch (dtype) {
    case DType::F32: return rotate_as<float>(x, stages, factor, y, d, stage, begin, end);
    case DType::F64: return rotate_as<double>(x, stages, factor, y, d, stage, begin, end);
    case DType::BF16: return rotate_as<bf16>(x, stages, factor, y, d, stage, begin, end);
  }
}

namespace {

template <class T>
void copy_rows(const void* x, void* y, int64_t d, int64_t begin, int64_t end) {
  std::memcpy(static_cast<T*>(y) + begin * d, static_cast<const T*>(x) + begin * d,
              size_t((end - begin) * d) * sizeof(T));
}

template <class T>
void poison_rows(void* y, int64_t d, int64_t begin, int64_t end) {
  std::fill(static_cast<T*>(y) + begin * d, static_cast<T*>(y) + end * d,
            narrow<T>(std::numeric_limits<Compute<T>>::quiet_NaN()));
}

template <class T>
void indexed_as(const void* x, const void* stages, const int32_t* index, void* y,
                int64_t n_adapters, int64_t d, const Stage& s, int64_t begin, int64_t end) {
  // Neighboring rows often belong to one request, so a run of rows of one adapter is rotated at
  // once.
  for (int64_t n = begin, last; n < end; n = last) {
    const int64_t adapter = index[n];
    for (last = n + 1; last < end && index[last] == adapter;) ++last;
    if (adapter == -1)
      copy_rows<T>(x, y, d, n, last);
    else if (adapter < 0 || adapter >= n_adapters)
      poison_rows<T>(y, d, n, last);
    else
      rotate_as<T>(x, static_cast<const Compute<T>*>(stages) + adapter * d * s.size, nullptr, y, d,
                   s, n, last);
  }
}

}  // namespace

void rotate_indexed(const void* x, const void* stages, const int32_t* index, void* y,
                    int64_t n_adapters, int64_t d, Stage stage, int64_t begin, int64_t end,
                    DType dtype) {
  const auto run = [&](auto as) { as(x, stages, index, y, n_adapters, d, stage, begin, end); };
  switch (dtype) {
    case DType::F32: return run(indexed_as<float>);
    case DType::F64: return run(indexed_as<double>);
    case DType::BF16: return run(indexed_as<bf16>);
  }
}

void rotate_backward(const void* grad, const void* x, const void* stages, void* x_grad,
                     void* stages_grad, int64_t rows, int64_t d, Stage stage, bool transpose,
                     int64_t begin, int64_t end, DType dtype) {
  const auto run = [&](auto as) {
    as(grad, x, stages, x_grad, stages_grad, rows, d, stage, transpose, begin, end);
  };
  switch (dtype) {
    case DType::F32: return run(backward_as<float>);
    case DType::F64: return run(backward_as<double>);
    case DType::BF16: return run(backward_as<bf16>);
  }
}

namespace {

template <class T>
void segments_as(const void* x, const void* grad, const int32_t* offsets, void* stage_grads,
                 int64_t n_segments, int64_t rows, int64_t d, const Stage& s, int64_t begin,
                 int64_t end) {
  using C = Compute<T>;
  const auto inside = [&](int64_t row) { return std::clamp<int64_t>(row, 0, rows); };
  for (int64_t e = 0; e < n_segments; ++e) {
    const int64_t first = e == 0 ? 0 : inside(offsets[e - 1]), last = inside(offsets[e]);
    backward_as<T>(static_cast<const T*>(grad) + first * d, static_cast<const T*>(x) + first * d,
                   nullptr, nullptr, static_cast<C*>(stage_grads) + e * d * s.size,
                   std::max<int64_t>(last - first, 0), d, s, false, begin, end);
  }
}

}  // namespace

void segment_stage_grads(const void* x, const void* grad, const int32_t* offsets,
                         void* stage_grads, int64_t n_segments, int64_t rows, int64_t d,
                         Stage stage, int64_t begin, int64_t end, DType dtype) {
  const auto run = [&](auto as) {
    as(x, grad, offsets, stage_grads, n_segments, rows, d, stage, begin, end);
  };
  switch (dtype) {
    case DType::F32: return run(segments_as<float>);
    case DType::F64: return run(segments_as<double>);
    case DType::BF16: return run(segments_as<bf16>);
  }
}

}  // namespace boft::cpu
