// The rotated linear layer y = scale * (x R W^T) + bias as one matrix product (docs/linear.md).
//
// A fast product has to pack its operands and to store its result in any case, so the rest of the
// layer is done on the way: x is rotated while it is packed, scale and bias are applied while y is
// stored. The backward pass rotates x_grad and computes the gradient of R while its result is in
// cache.
//
// The rest is a product as in a BLAS: C = A B with A the weight (outputs x depth), B the rows
// of x, here called tokens (depth x tokens), and C (outputs x tokens). A tile of C stays in
// registers while the sum over the depth runs. A and B are packed in the order in which that loop
// reads them: B in panels (depth, S::tokens), A in strips (depth, S::outputs).
#include <vector>

#include "boft_kernels.h"
#include "common.h"
#include "tile.h"
#include "transpose.h"

namespace boft::cpu {
namespace {

constexpr int64_t kDepth = 256;    // terms of the sum that one pass over a tile of C adds up
constexpr int64_t kFeatures = 64;  // least number of features that are packed at a time

// Size of a tile of C in registers.
template <int BYTES>
struct Shape {
  static constexpr int64_t lanes = BYTES / 4;
  static constexpr int64_t tokens = 2 * lanes;  // also the tokens of a packed panel
  // The tile of C takes 2 * outputs registers, B two and A one, of 32 (AVX-512) or 16 in all.
  static constexpr int64_t outputs = BYTES == 64 ? 12 : 6 < lanes ? 6 : lanes;
};

// Computes a tile of C: c[i][t] = sum over k < depth of a[k][i] * b[k][t], or adds that if `add`.
// Every step loads two vectors of b and multiplies them by S::outputs numbers of a; 2 * S::outputs
// independent sums hide the latency of the multiply-adds. b is prefetched 16 steps ahead.
//   a: (depth, S::outputs), one strip of the packed weight
//   b: (depth, S::tokens), a part of one packed panel
//   c: (S::outputs, S::tokens)
template <int BYTES>
BOFT_INLINE void product(const float* a, const float* b, float* c, int64_t depth, bool add) {
  using V = typename Vector<float, BYTES>::type;
  using S = Shape<BYTES>;
  V sums[S::outputs][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(b + (k + 16) * S::tokens);
    __builtin_prefetch(b + (k + 16) * S::tokens + S::lanes);
    const V first = *reinterpret_cast<const V*>(b + k * S::tokens);
    const V second = *reinterpret_cast<const V*>(b + k * S::tokens + S::lanes);
    for (int64_t i = 0; i < S::outputs; ++i) {
      const float factor = a[k * S::outputs + i];
      sums[i][0] += factor * first;
      sums[i][1] += factor * second;
    }
  }
  for (int64_t i = 0; i < S::outputs; ++i)
    for (int64_t v = 0; v < 2; ++v) {
      V& out = *reinterpret_cast<V*>(c + i * S::tokens + v * S::lanes);
      out = add ? out + sums[i][v] : sums[i][v];  // passes summed apart: less rounding
    }
}

// Calls CALL(SIZE) for the common sizes of a stage, so that they are known at compile time.
#define BOFT_SIZES(CALL) \
  switch (size) {        \
    case 4: CALL(4)      \
    case 8: CALL(8)      \
    case 16: CALL(16)    \
    case 32: CALL(32)    \
    default: break;      \
  }
// Computes out = in * matrix (tile.h) for any size of the stage.
template <int BYTES>
BOFT_INLINE void rotate_tile(const float* in, int64_t in_stride, const float* matrix, float* out,
                             int64_t out_stride, int64_t rows, int64_t size) {
#define BOFT_CALL(SIZE) \
  return multiply<fitting<float>(BYTES, SIZE)>(in, in_stride, matrix, out, out_stride, rows, SIZE);
  BOFT_SIZES(BOFT_CALL)
#undef BOFT_CALL
  multiply<BYTES>(in, in_stride, matrix, out, out_stride, rows, size);
}
// Adds left^T right to `out` (tile.h) for any size of the stage.
template <int BYTES>
BOFT_INLINE void gram(const float* left, int64_t left_stride, const float* right,
                      int64_t right_stride, float* out, int64_t rows, int64_t size) {
#define BOFT_CALL(SIZE)                                                                        \
  return gram_tile<fitting<float>(BYTES, SIZE), SIZE>(left, left_stride, right, right_stride, out, \
                                                      rows, SIZE);
  BOFT_SIZES(BOFT_CALL)
#undef BOFT_CALL
  gram_tile<BYTES, 0>(left, left_stride, right, right_stride, out, rows, size);
}
#undef BOFT_SIZES

// Packs S::tokens rows of `in`, (S::tokens, columns) without gaps, as a panel (columns, S::tokens).
template <int BYTES>
BOFT_INLINE void pack_panel(const float* in, int64_t columns, float* panel) {
  using S = Shape<BYTES>;
  int64_t c = 0;
  for (; c + S::lanes <= columns; c += S::lanes)
    for (int64_t half = 0; half < S::tokens; half += S::lanes)
      transpose<BYTES, S::lanes>(in + half * columns + c, columns, panel + c * S::tokens + half,
                                 S::tokens);
  for (; c < columns; ++c)
    for (int64_t t = 0; t < S::tokens; ++t) panel[c * S::tokens + t] = in[t * columns + c];
}

// Packs panels [begin, end) of x R; arguments as in linear_pack. A few groups at a time are rotated
// into `buffer`, which stays in the first-level cache, and transposed from there.
template <int BYTES>
BOFT_INLINE void pack_forward(const float* x, const float* stages, float* packed, int64_t rows,
                              int64_t d, int64_t size, int64_t begin, int64_t end, float* buffer) {
  using S = Shape<BYTES>;
  const int64_t step = (kFeatures + size - 1) / size * size;
  for (int64_t q = begin; q < end; ++q) {
    const int64_t top = q * S::tokens, count = rows - top < S::tokens ? rows - top : S::tokens;
    for (int64_t f = 0; f < d; f += step) {
      const int64_t width = d - f < step ? d - f : step;
      std::memset(buffer + count * width, 0, size_t((S::tokens - count) * width) * sizeof(float));
      for (int64_t c = 0; c < width; c += size)
        rotate_tile<BYTES>(x + top * d + f + c, d, stages + (f + c) * size, buffer + c, width,
                           count, size);
      pack_panel<BYTES>(buffer, width, packed + top * d + f * S::tokens);
    }
  }
}

// Packs panels [begin, end) of grad * scale and, as the rows are read anyway, sums grad * (z - center)
// and grad over the rows of each panel; arguments as in linear_backward_pack.
template <int BYTES>
BOFT_INLINE void pack_backward(const float* grad, const float* z, const float* scale,
                               const float* center, float* packed, float* scale_sums,
                               float* bias_sums, int64_t rows, int64_t n, int64_t begin,
                               int64_t end, float* buffer) {
  using S = Shape<BYTES>;
  for (int64_t q = begin; q < end; ++q) {
    const int64_t top = q * S::tokens, count = rows - top < S::tokens ? rows - top : S::tokens;
    for (int64_t f = 0; f < n; f += kFeatures) {
      const int64_t width = n - f < kFeatures ? n - f : kFeatures;
      float products[kFeatures] = {}, sums[kFeatures] = {};
      for (int64_t t = 0; t < count; ++t) {
        const float* row = grad + (top + t) * n + f;
        for (int64_t c = 0; c < width; ++c) sums[c] += row[c];
        if (z) {
          const float* output = z + (top + t) * n + f;
          if (center)
            for (int64_t c = 0; c < width; ++c) products[c] += row[c] * (output[c] - center[f + c]);
          else
            for (int64_t c = 0; c < width; ++c) products[c] += row[c] * output[c];
        }
        float* to = buffer + t * width;
        if (scale)
          for (int64_t c = 0; c < width; ++c) to[c] = row[c] * scale[f + c];
        else
          std::memcpy(to, row, size_t(width) * sizeof(float));
      }
      std::memset(buffer + count * width, 0, size_t((S::tokens - count) * width) * sizeof(float));
      std::memcpy(scale_sums + q * n + f, products, size_t(width) * sizeof(float));
      std::memcpy(bias_sums + q * n + f, sums, size_t(width) * sizeof(float));
      pack_panel<BYTES>(buffer, width, packed + top * n + f * S::tokens);
    }
  }
}

// Forward and Backward are the two products of run(). They differ in the way in which a strip of
// the weight is packed, and in the use of the result. run() calls start() before the first result
// of a block of tokens, and finish() for each panel: tile[t * stride + c] is the result for token
// top + t and output j + c, with t < count and c < width.
struct Forward {
  const float *weight, *scale, *bias, *center;
  float *y, *z;
  int64_t rows, d, n;

  int64_t depth() const { return d; }
  int64_t outputs() const { return n; }

  // Packs a strip: a[k][i] = weight[j + i][first + k], zeros beyond the last output.
  template <int BYTES>
  BOFT_INLINE void pack_weight(int64_t j, int64_t first, int64_t depth, float* a) const {
    using S = Shape<BYTES>;
    const float* from = weight + j * d + first;
    int64_t k = 0;
    if (j + S::outputs <= n)
      for (; k + S::lanes <= depth; k += S::lanes)
        transpose<BYTES, S::outputs>(from + k, d, a + k * S::outputs, S::outputs);
    for (; k < depth; ++k)
      for (int64_t i = 0; i < S::outputs; ++i)
        a[k * S::outputs + i] = j + i < n ? from[i * d + k] : 0.0f;
  }

  template <int BYTES>
  BOFT_INLINE void start(int64_t, int64_t, int64_t) const {}

  template <int BYTES>
  BOFT_INLINE void finish(const float* tile, int64_t stride, int64_t, int64_t top, int64_t count,
                          int64_t j, int64_t width) const {
    for (int64_t t = 0; t < count; ++t) {
      const float* from = tile + t * stride;
      float* to = y + (top + t) * n + j;
      if (z && center)
        for (int64_t c = 0; c < width; ++c) z[(top + t) * n + j + c] = from[c] + center[j + c];
      else if (z)
        std::memcpy(z + (top + t) * n + j, from, size_t(width) * sizeof(float));
      if (scale && bias)
        for (int64_t c = 0; c < width; ++c) to[c] = from[c] * scale[j + c] + bias[j + c];
      else if (scale)
        for (int64_t c = 0; c < width; ++c) to[c] = from[c] * scale[j + c];
      else if (bias)
        for (int64_t c = 0; c < width; ++c) to[c] = from[c] + bias[j + c];
      else
        std::memcpy(to, from, size_t(width) * sizeof(float));
    }
  }
};

struct Backward {
  const float *weight, *x, *stages;
  float *x_grad, *grams;
  int64_t rows, d, n, size;

  int64_t depth() const { return n; }
  int64_t outputs() const { return d; }

  // Packs a strip of W^T: a[k][i] = weight[first + k][j + i], zeros beyond the last output.
  template <int BYTES>
  BOFT_INLINE void pack_weight(int64_t j, int64_t first, int64_t depth, float* a) const {
    using S = Shape<BYTES>;
    using V = typename Vector<float, BYTES>::type;
    const float* from = weight + first * d + j;
    if (j + S::lanes <= d)  // step k writes a whole vector; step k + 1 overwrites its excess
      for (int64_t k = 0; k < depth; ++k)
        *reinterpret_cast<V*>(a + k * S::outputs) = *reinterpret_cast<const V*>(from + k * d);
    else
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t i = 0; i < S::outputs; ++i)
          a[k * S::outputs + i] = j + i < d ? from[k * d + i] : 0.0f;
  }

  template <int BYTES>
  BOFT_INLINE void start(int64_t block, int64_t j, int64_t width) const {
    std::memset(grams + (block * d + j) * size, 0, size_t(width * size) * sizeof(float));
  }

  template <int BYTES>
  BOFT_INLINE void finish(const float* tile, int64_t stride, int64_t block, int64_t top,
                          int64_t count, int64_t j, int64_t width) const {
    for (int64_t c = 0; c < width; c += size) {
      const int64_t at = top * d + j + c;
      gram<BYTES>(x + at, d, tile + c, stride, grams + (block * d + j + c) * size, count, size);
      rotate_tile<BYTES>(tile + c, stride, stages + (j + c) * size, x_grad + at, d, count, size);
    }
  }
};

// Computes units [begin, end) of a product. A unit is one block of kLinearRows tokens times `unit`
// outputs, which are whole tiles and whole groups; units of one block follow each other.
// Neighboring units are joined up to at_once outputs, for which a part of the weight, kDepth deep,
// is packed once and multiplied by all panels of the block. Only when the sum over the depth is
// complete, tiles are transposed to rows of tokens and given to op.finish().
//   packed:  panels of B, from linear_pack or linear_backward_pack
//   scratch: memory from scratch(): strips of A, tiles of C for a block, rows of one panel
template <int BYTES, class Op>
BOFT_INLINE void run(const Op& op, const float* packed, int64_t unit, int64_t begin, int64_t end,
                     int64_t at_once, float* scratch) {
  using S = Shape<BYTES>;
  constexpr int64_t most = kLinearRows / S::tokens;
  const int64_t row = at_once + S::lanes;
  float *a = scratch, *c = a + at_once * kDepth + S::lanes;
  float* tile = c + at_once * kLinearRows;
  const int64_t depth = op.depth(), outputs = op.outputs();
  const int64_t units = (outputs + unit - 1) / unit, per_block = at_once / unit;
  for (int64_t u = begin; u < end;) {
    const int64_t block = u / units, stop = (block + 1) * units < end ? (block + 1) * units : end;
    const int64_t next = u + per_block < stop ? u + per_block : stop;
    const int64_t j = u % units * unit;
    const int64_t j_end = j + (next - u) * unit < outputs ? j + (next - u) * unit : outputs;
    const int64_t tiles = (j_end - j + S::outputs - 1) / S::outputs;
    const int64_t top = block * kLinearRows, left = op.rows - top;
    const int64_t panels = left < kLinearRows ? (left + S::tokens - 1) / S::tokens : most;
    for (int64_t first = 0; first < depth; first += kDepth) {
      const int64_t step = depth - first < kDepth ? depth - first : kDepth;
      for (int64_t p = 0; p < tiles; ++p)
        op.template pack_weight<BYTES>(j + p * S::outputs, first, step, a + p * S::outputs * step);
      for (int64_t q = 0; q < panels; ++q)
        for (int64_t p = 0; p < tiles; ++p)
          product<BYTES>(a + p * S::outputs * step,
                         packed + (top + q * S::tokens) * depth + first * S::tokens,
                         c + (q * tiles + p) * S::outputs * S::tokens, step, first > 0);
    }
    op.template start<BYTES>(block, j, j_end - j);
    for (int64_t q = 0; q < panels; ++q) {
      for (int64_t p = 0; p < tiles; ++p)
        for (int64_t half = 0; half < S::tokens; half += S::lanes)
          transpose<BYTES, S::outputs>(c + (q * tiles + p) * S::outputs * S::tokens + half,
                                       S::tokens, tile + half * row + p * S::outputs, row);
      const int64_t count = left - q * S::tokens < S::tokens ? left - q * S::tokens : S::tokens;
      op.template finish<BYTES>(tile, row, block, top + q * S::tokens, count, j, j_end - j);
    }
    u = next;
  }
}

// Scratch memory of a thread for run(), aligned to 64 bytes; it fits the second-level cache of a
// core. Each thread keeps its own, because to allocate this much for every call costs more than to
// use it.
float* scratch(int64_t at_once) {
  constexpr int64_t widest = 16;
  thread_local std::vector<float> memory;
  memory.resize(size_t(at_once * (kDepth + kLinearRows) + 2 * widest * (at_once + widest) +
                       2 * widest));
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (64 - address % 64) % 64 / sizeof(float);
}

#define BOFT_LINEAR(SUFFIX, BYTES, TARGET)                                                         \
  TARGET void pack_forward_##SUFFIX(const float* x, const float* stages, float* packed,            \
                                    int64_t rows, int64_t d, int64_t size, int64_t begin,          \
                                    int64_t end, float* buffer) {                                  \
    pack_forward<BYTES>(x, stages, packed, rows, d, size, begin, end, buffer);                     \
  }                                                                                                \
  TARGET void pack_backward_##SUFFIX(const float* grad, const float* z, const float* scale,        \
                                     const float* center, float* packed, float* scale_sums,        \
                                     float* bias_sums, int64_t rows, int64_t n, int64_t begin,     \
                                     int64_t end, float* buffer) {                                 \
    pack_backward<BYTES>(grad, z, scale, center, packed, scale_sums, bias_sums, rows, n, begin,    \
                         end, buffer);                                                             \
  }                                                                                                \
  TARGET void forward_##SUFFIX(const Forward& op, const float* packed, int64_t unit,               \
                               int64_t begin, int64_t end, int64_t at_once, float* memory) {       \
    run<BYTES>(op, packed, unit, begin, end, at_once, memory);                                     \
  }                                                                                                \
  TARGET void backward_##SUFFIX(const Backward& op, const float* packed, int64_t unit,             \
                                int64_t begin, int64_t end, int64_t at_once, float* memory) {      \
    run<BYTES>(op, packed, unit, begin, end, at_once, memory);                                     \
  }                                                                                                \
  int64_t panel_##SUFFIX() { return Shape<BYTES>::tokens; }                                        \
  int64_t outputs_##SUFFIX() { return Shape<BYTES>::outputs; }
BOFT_ISAS(BOFT_LINEAR)

// Least number of outputs that is a multiple of a tile of C and of the size of a stage.
int64_t unit_of(int64_t size) {
  const int64_t tile = BOFT_RUN(outputs);
  int64_t unit = tile;
  while (unit % size) unit += tile;
  return unit;
}

}  // namespace

int64_t linear_panel() { return BOFT_RUN(panel); }

bool linear_takes(int64_t size) { return kLinearOutputs % size == 0; }

int64_t linear_units(int64_t rows, int64_t outputs, int64_t size) {
  const int64_t unit = unit_of(size);
  return (rows + kLinearRows - 1) / kLinearRows * ((outputs + unit - 1) / unit);
}

void linear_pack(const float* x, const float* stages, float* packed, int64_t rows, int64_t d,
                 int64_t size, int64_t begin, int64_t end) {
  std::vector<float> buffer(size_t(linear_panel() * (kFeatures + size)));
  BOFT_RUN(pack_forward, x, stages, packed, rows, d, size, begin, end, buffer.data());
}

void linear(const float* packed, const float* weight, const float* scale, const float* bias,
            const float* center, float* y, float* z, int64_t rows, int64_t d, int64_t n,
            int64_t begin, int64_t end) {
  const Forward op{weight, scale, bias, center, y, z, rows, d, n};
  constexpr int64_t at_once = kLinearOutputs;
  BOFT_RUN(forward, op, packed, unit_of(1), begin, end, at_once, scratch(at_once));
}

void linear_backward_pack(const float* grad, const float* z, const float* scale,
                          const float* center, float* packed, float* scale_sums, float* bias_sums,
                          int64_t rows, int64_t n, int64_t begin, int64_t end) {
  std::vector<float> buffer(size_t(linear_panel() * kFeatures));
  BOFT_RUN(pack_backward, grad, z, scale, center, packed, scale_sums, bias_sums, rows, n, begin,
           end, buffer.data());
}

void linear_backward(const float* packed, const float* weight, const float* x, const float* stages,
                     float* x_grad, float* grams, int64_t rows, int64_t d, int64_t n, int64_t size,
                     int64_t begin, int64_t end) {
  const Backward op{weight, x, stages, x_grad, grams, rows, d, n, size};
  constexpr int64_t at_once = kLinearOutputs;
  BOFT_RUN(backward, op, packed, unit_of(size), begin, end, at_once, scratch(at_once));
}

}  // namespace boft::cpu
