// The rotated linear layer as one matrix product: the rotation is applied while the operand is
// packed, scale and bias while the result is stored, and the backward pass rotates its result and
// takes the Gram while that is in cache (docs/linear.md). What remains is a product like any BLAS':
// C (outputs x tokens) is made in tiles of kRows x 2 vectors held in registers, from A = the weight
// and B = the activations, both packed in the order in which they are read.
#include <vector>

#include "boft_kernels.h"
#include "common.h"
#include "tile.h"
#include "transpose.h"

namespace boft::cpu {
namespace {

constexpr int64_t kDepth = 256;    // of the sum that one pass over a tile adds up
constexpr int64_t kFeatures = 64; // features that are packed at a time, at least

template <int BYTES>
struct Shape {
  static constexpr int64_t lanes = BYTES / 4;
  static constexpr int64_t tokens = 2 * lanes;  // of a tile, and of a packed panel
  // with the tile of C, two vectors of B and one of A fill the registers (32 of them, or 16)
  static constexpr int64_t outputs = BYTES == 64 ? 12 : 6 < lanes ? 6 : lanes;
};

// C[i][t] (+)= sum over k of a[k][i] b[k][t]
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
      out = add ? out + sums[i][v] : sums[i][v];  // summed apart: rounding grows slower
    }
}

// Rows times one stage matrix, and their Gram, with the common sizes known when compiling.
#define BOFT_SIZES(CALL) \
  switch (size) {        \
    case 4: CALL(4)      \
    case 8: CALL(8)      \
    case 16: CALL(16)    \
    case 32: CALL(32)    \
    default: break;      \
  }
template <int BYTES>
BOFT_INLINE void rotate_tile(const float* in, int64_t in_stride, const float* matrix, float* out,
                             int64_t out_stride, int64_t rows, int64_t size) {
#define BOFT_CALL(SIZE) \
  return multiply<fitting<float>(BYTES, SIZE)>(in, in_stride, matrix, out, out_stride, rows, SIZE);
  BOFT_SIZES(BOFT_CALL)
#undef BOFT_CALL
  multiply<BYTES>(in, in_stride, matrix, out, out_stride, rows, size);
}
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

// The rows of `in`, `columns` wide, as columns of a panel.
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

// Also the sums over a panel's rows of grad * z and of grad.
template <int BYTES>
BOFT_INLINE void pack_backward(const float* grad, const float* z, const float* scale, float* packed,
                               float* scale_sums, float* bias_sums, int64_t rows, int64_t n,
                               int64_t begin, int64_t end, float* buffer) {
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

// What differs between the two products: how the weight is read, what is done with the result.
struct Forward {
  const float *weight, *scale, *bias;
  float *y, *z;
  int64_t rows, d, n;

  int64_t depth() const { return d; }
  int64_t outputs() const { return n; }

  // a[k][i] = weight[j + i][first + k]
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
      if (z) std::memcpy(z + (top + t) * n + j, from, size_t(width) * sizeof(float));
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

  // a[k][i] = weight[first + k][j + i]
  template <int BYTES>
  BOFT_INLINE void pack_weight(int64_t j, int64_t first, int64_t depth, float* a) const {
    using S = Shape<BYTES>;
    using V = typename Vector<float, BYTES>::type;
    const float* from = weight + first * d + j;
    if (j + S::lanes <= d)  // what is written beyond the outputs is written again
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

// Units [begin, end): `unit` outputs each, of one block of kLinearRows tokens after the other, with
// up to at_once outputs of the weight packed at a time.
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

// The tile of C and a row of the weight's tiles stay in the second-level cache of a core: kept by
// each thread, as a fresh allocation of this size costs more than what it is for.
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
                                     float* packed, float* scale_sums, float* bias_sums,           \
                                     int64_t rows, int64_t n, int64_t begin, int64_t end,          \
                                     float* buffer) {                                              \
    pack_backward<BYTES>(grad, z, scale, packed, scale_sums, bias_sums, rows, n, begin, end,       \
                         buffer);                                                                  \
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

// The least number of outputs that is made of whole tiles and whole groups of a stage.
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
            float* y, float* z, int64_t rows, int64_t d, int64_t n, int64_t begin, int64_t end) {
  const Forward op{weight, scale, bias, y, z, rows, d, n};
  const int64_t at_once = tunables().linear_outputs;
  BOFT_RUN(forward, op, packed, unit_of(1), begin, end, at_once, scratch(at_once));
}

void linear_backward_pack(const float* grad, const float* z, const float* scale, float* packed,
                          float* scale_sums, float* bias_sums, int64_t rows, int64_t n,
                          int64_t begin, int64_t end) {
  std::vector<float> buffer(size_t(linear_panel() * kFeatures));
  BOFT_RUN(pack_backward, grad, z, scale, packed, scale_sums, bias_sums, rows, n, begin, end,
           buffer.data());
}

void linear_backward(const float* packed, const float* weight, const float* x, const float* stages,
                     float* x_grad, float* grams, int64_t rows, int64_t d, int64_t n, int64_t size,
                     int64_t begin, int64_t end) {
  const Backward op{weight, x, stages, x_grad, grams, rows, d, n, size};
  const int64_t at_once = tunables().linear_outputs;
  BOFT_RUN(backward, op, packed, unit_of(size), begin, end, at_once, scratch(at_once));
}

}  // namespace boft::cpu
