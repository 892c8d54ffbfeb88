// Cayley transform R = (I + Q)(I - Q)^-1 of many small skew-symmetric blocks, and its gradient.
//
// The kernels are vectorized across blocks: a tile holds element (i, j) of kTile blocks side by
// side, so that blocks of b = 2, 4, 8 fill the vector lanes as well as those of b = 64. Since
// I + Q = 2 I - (I - Q), R is 2 (I - Q)^-1 - I: one inverse, no further product. All is computed in
// double, because the blocks are tiny beside the activations.
//
// An elimination without pivoting makes entries of size |Q|^2, and what is left of them after they
// cancel is off by 1e-16 |Q|^2. Blocks with a number beyond kPivotFrom are therefore inverted once
// more, one by one and with pivoting, whose error is 1e-16 |Q|. Training does not come there: such
// a block turns a plane by more than 178 degrees.
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "boft_kernels.h"
#include "common.h"
#include "transpose.h"

namespace boft::cpu {
namespace {

// Rounds a double to the element type, once.
template <class T>
BOFT_INLINE T round_to(double value) {
  return T(value);
}
template <>
BOFT_INLINE bf16 round_to<bf16>(double value) {
  // Two roundings, from double to float and from float to bf16, give the right result unless the
  // first one makes a tie. The first one therefore rounds to an odd last bit, which is never a tie.
  float rounded = float(value);
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  if (double(rounded) != value && (bits & 1) == 0) {
    const bool away = (double(rounded) > value) == (value > 0);  // |rounded| > |value|
    bits += away ? uint32_t(-1) : 1u;
    std::memcpy(&rounded, &bits, sizeof rounded);
  }
  return round_to_bf16(rounded);
}

// Loads `count` <= kTile blocks of `length` numbers each, in double: number p of block v comes to
// tile[p * kTile + v]. Blocks beyond `count` are zeros.
template <class T>
BOFT_INLINE void load(const T* from, int64_t length, int64_t count, double* tile) {
  int64_t p = 0;
  if (std::is_same_v<T, float> && count == kTile)
    for (; p + kTile <= length; p += kTile) {
      float square[kTile * kTile];
      transpose<sizeof(float) * kTile, kTile>(reinterpret_cast<const float*>(from) + p, length,
                                              square, kTile);
      for (int i = 0; i < kTile * kTile; ++i) tile[p * kTile + i] = double(square[i]);
    }
  for (; p < length; ++p)
    for (int64_t v = 0; v < kTile; ++v)
      tile[p * kTile + v] = v < count ? double(widen(from[v * length + p])) : 0.0;
}

// Stores a tile as blocks of `length` numbers: the opposite of load().
template <class T>
BOFT_INLINE void store(const double* tile, int64_t length, int64_t count, T* to) {
  int64_t p = 0;
  if (std::is_same_v<T, float> && count == kTile)
    for (; p + kTile <= length; p += kTile) {
      float square[kTile * kTile];
      for (int i = 0; i < kTile * kTile; ++i) square[i] = float(tile[p * kTile + i]);
      transpose<sizeof(float) * kTile, kTile>(square, kTile, reinterpret_cast<float*>(to) + p,
                                              length);
    }
  for (; p < length; ++p)
    for (int64_t v = 0; v < count; ++v) to[v * length + p] = round_to<T>(tile[p * kTile + v]);
}

// One element (i, j) of all blocks of a tile: a vector of kTile doubles. A matrix of Lanes is
// padded to whole pieces of P x P, with P = 4 (2 for b = 2), because the product of two pieces
// stays in registers.
typedef double Lanes __attribute__((vector_size(kTile * sizeof(double)), may_alias));

// Computes c = a b, or c -= a b, for a P x P piece of c. The inner dimension has `depth` elements.
// Element (i, k) of a lies at a[i * a_row + k * a_column], and b likewise, so either can be a
// transpose; rows of c lie c_row apart.
enum class Into { Set, Subtract };
template <int P, Into into>
BOFT_INLINE void product(const Lanes* a, int64_t a_row, int64_t a_column, const Lanes* b,
                         int64_t b_row, int64_t b_column, int64_t depth, Lanes* c, int64_t c_row) {
  Lanes sums[P][P] = {};
  for (int64_t k = 0; k < depth; ++k)
    for (int i = 0; i < P; ++i)
      for (int j = 0; j < P; ++j)
        sums[i][j] += a[i * a_row + k * a_column] * b[k * b_row + j * b_column];
  for (int i = 0; i < P; ++i)
    for (int j = 0; j < P; ++j) {
      Lanes& out = c[i * c_row + j];
      out = into == Into::Set ? sums[i][j] : out - sums[i][j];
    }
}

// Inverts one P x P piece in place by Gauss-Jordan elimination; its rows lie `row` apart. No
// pivoting is needed: the symmetric part of A = I - Q is I, and that of every Schur complement is
// at least I, so no pivot is ever below 1.
template <int P>
BOFT_INLINE void invert_piece(Lanes* a, int64_t row) {
  Lanes x[P][P];
  for (int i = 0; i < P; ++i)
    for (int j = 0; j < P; ++j) x[i][j] = a[i * row + j];
  for (int k = 0; k < P; ++k) {
    const Lanes inverse = 1.0 / x[k][k];
    for (int j = 0; j < P; ++j) x[k][j] = j == k ? inverse : x[k][j] * inverse;
    for (int i = 0; i < P; ++i) {
      if (i == k) continue;
      const Lanes factor = x[i][k];
      for (int j = 0; j < P; ++j)
        x[i][j] = j == k ? -factor * inverse : x[i][j] - factor * x[k][j];
    }
  }
  for (int i = 0; i < P; ++i)
    for (int j = 0; j < P; ++j) a[i * row + j] = x[i][j];
}

// Inverts a size x size matrix in place, size a multiple of P, by the same elimination with pieces
// in the place of numbers. Step k inverts the pivot piece, multiplies row k by the inverse,
// subtracts multiples of that row from all others, and puts column k of the inverse into column k.
// `spare` holds one P x P piece, since a piece cannot be read and overwritten in one product.
template <int P>
BOFT_INLINE void invert(Lanes* a, int64_t size, Lanes* spare) {
  for (int64_t k = 0; k < size; k += P) {
    Lanes* pivot = a + k * size + k;
    invert_piece<P>(pivot, size);
    for (int64_t j = 0; j < size; j += P) {  // row k becomes pivot^-1 a[k][j]
      if (j == k) continue;
      product<P, Into::Set>(pivot, size, 1, a + k * size + j, size, 1, P, spare, P);
      for (int i = 0; i < P; ++i)
        for (int l = 0; l < P; ++l) a[(k + i) * size + j + l] = spare[i * P + l];
    }
    for (int64_t i = 0; i < size; i += P) {
      if (i == k) continue;
      Lanes* column = a + i * size + k;
      for (int64_t j = 0; j < size; j += P)
        if (j != k)
          product<P, Into::Subtract>(column, size, 1, a + k * size + j, size, 1, P,
                                     a + i * size + j, size);
      for (int r = 0; r < P; ++r)
        for (int l = 0; l < P; ++l) {
          spare[r * P + l] = column[r * size + l];
          column[r * size + l] = Lanes{};
        }
      product<P, Into::Subtract>(spare, P, 1, pivot, size, 1, P, column, size);
    }
  }
}

// Inverts a (b, b) in place by Gauss-Jordan elimination with partial pivoting. `order` is memory for
// the b rows that were pivots.
BOFT_INLINE void invert_pivoted(double* a, double* order, int64_t b) {
  for (int64_t k = 0; k < b; ++k) {
    int64_t pivot = k;
    for (int64_t i = k + 1; i < b; ++i)
      if (std::fabs(a[i * b + k]) > std::fabs(a[pivot * b + k])) pivot = i;
    order[k] = double(pivot);
    if (pivot != k)
      for (int64_t j = 0; j < b; ++j) std::swap(a[k * b + j], a[pivot * b + j]);
    const double inverse = 1.0 / a[k * b + k];
    a[k * b + k] = 1.0;
    for (int64_t j = 0; j < b; ++j) a[k * b + j] *= inverse;
    for (int64_t i = 0; i < b; ++i) {
      if (i == k) continue;
      const double factor = a[i * b + k];
      a[i * b + k] = 0.0;
      for (int64_t j = 0; j < b; ++j) a[i * b + j] -= factor * a[k * b + j];
    }
  }
  for (int64_t k = b - 1; k >= 0; --k) {  // rows were exchanged, so columns of the inverse are too
    const auto pivot = int64_t(order[k]);
    if (pivot != k)
      for (int64_t i = 0; i < b; ++i) std::swap(a[i * b + k], a[i * b + pivot]);
  }
}

// The largest number of a skew-symmetric block that is eliminated without pivoting.
constexpr double kPivotFrom = 64.0;

// Computes the largest of the `packed` numbers of each block, without signs.
BOFT_INLINE void find_largest(const Lanes* skew, int64_t packed, Lanes& largest) {
  largest = Lanes{};
  for (int64_t p = 0; p < packed; ++p) {
    largest = skew[p] > largest ? skew[p] : largest;
    largest = -skew[p] > largest ? -skew[p] : largest;
  }
}

// Computes R of the block of lane v, (b, b), with pivoting. `memory` is for b * b + b numbers.
BOFT_INLINE void transform_large(const Lanes* skew, int64_t b, int64_t v, double* memory,
                                 Lanes* blocks) {
  double* order = memory + b * b;
  for (int64_t i = 0; i < b; ++i) {
    memory[i * b + i] = 1.0;
    for (int64_t j = i + 1; j < b; ++j) {
      const double value = (*skew++)[v];
      memory[i * b + j] = -value, memory[j * b + i] = value;
    }
  }
  invert_pivoted(memory, order, b);
  for (int64_t i = 0; i < b; ++i)
    for (int64_t j = 0; j < b; ++j)
      blocks[i * b + j][v] = 2.0 * memory[i * b + j] - (i == j ? 1.0 : 0.0);
}

// Block size rounded up to whole pieces.
constexpr int64_t padded(int64_t b, int64_t piece) { return (b + piece - 1) / piece * piece; }

// Transforms one tile of `count` blocks. `drop` is that of the tile, or null; `a` is scratch memory
// for the matrix, a spare piece, the packed triangle and one block more. A dropped block has Q = 0,
// hence R = I.
template <int P, class T>
BOFT_INLINE void forward_tile(const T* skew, const bool* drop, T* blocks, int64_t count, int64_t b,
                              Lanes* a) {
  const int64_t packed = b * (b - 1) / 2, size = padded(b, P);
  Lanes *spare = a + size * size, *skews = spare + P * P, *q = skews;
  load(skew, packed, count, reinterpret_cast<double*>(q));
  if (drop)
    for (int64_t v = 0; v < count; ++v)
      if (drop[v])
        for (int64_t p = 0; p < packed; ++p) q[p][v] = 0.0;
  for (int64_t i = 0; i < size; ++i) {
    a[i * size + i] = Lanes{} + 1.0;
    for (int64_t j = i + 1; j < size; ++j) {
      const Lanes value = j < b ? *q++ : Lanes{};
      a[i * size + j] = -value, a[j * size + i] = value;
    }
  }
  invert<P>(a, size, spare);
  for (int64_t i = 0; i < b; ++i)  // R = 2 (I - Q)^-1 - I, moved together without the padding
    for (int64_t j = 0; j < b; ++j)
      a[i * b + j] = 2.0 * a[i * size + j] - (i == j ? 1.0 : 0.0);
  Lanes largest;
  find_largest(skews, packed, largest);
  for (int64_t v = 0; v < count; ++v)
    if (largest[v] > kPivotFrom)
      transform_large(skews, b, v, reinterpret_cast<double*>(skews + packed), a);
  store(reinterpret_cast<double*>(a), b * b, count, blocks);
}

// Spreads a b x b matrix without gaps to size x size, in place, with zeros in the padding.
BOFT_INLINE void pad(Lanes* a, int64_t b, int64_t size) {
  if (b == size) return;
  for (int64_t i = size - 1; i >= 0; --i)
    for (int64_t j = size - 1; j >= 0; --j)
      a[i * size + j] = i < b && j < b ? a[i * b + j] : Lanes{};
}

// Computes the gradient for one tile of `count` blocks. `r` is scratch memory for three matrices.
template <int P, class T>
BOFT_INLINE void backward_tile(const T* blocks, const bool* drop, const T* grad, T* skew_grad,
                               int64_t count, int64_t b, Lanes* r) {
  const int64_t size = padded(b, P), area = size * size;
  Lanes *g = r + area, *t = g + area, *u = g;
  load(blocks, b * b, count, reinterpret_cast<double*>(r));
  load(grad, b * b, count, reinterpret_cast<double*>(g));
  pad(r, b, size), pad(g, b, size);
  for (int64_t i = 0; i < b; ++i) r[i * size + i] += 1.0;
  // With H = (I + R)^T: t = H G, then u = t H, which replaces G. The padding stays zero.
  for (int64_t i = 0; i < size; i += P)
    for (int64_t j = 0; j < size; j += P)
      product<P, Into::Set>(r + i, 1, size, g + j, size, 1, size, t + i * size + j, size);
  for (int64_t i = 0; i < size; i += P)
    for (int64_t j = 0; j < size; j += P)
      product<P, Into::Set>(t + i * size, size, 1, r + j * size, 1, size, size, u + i * size + j,
                            size);
  Lanes* out = t;
  for (int64_t i = 0; i < b; ++i)
    for (int64_t j = i + 1; j < b; ++j) *out++ = 0.5 * (u[i * size + j] - u[j * size + i]);
  const int64_t packed = b * (b - 1) / 2;
  if (drop)
    for (int64_t v = 0; v < count; ++v)
      if (drop[v])
        for (int64_t p = 0; p < packed; ++p) t[p][v] = 0.0;
  store(reinterpret_cast<double*>(t), packed, count, skew_grad);
}

// Piece size P for blocks of b; 0 stands for a block size that is known at run time only.
constexpr int piece_of(int64_t b) { return b == 2 ? 2 : 4; }

// Transforms tiles [begin, end). B is the block size if it is known at compile time, else 0.
template <int64_t B, class T>
BOFT_INLINE void forward_tiles(const T* skew, const bool* drop, T* blocks, int64_t n, int64_t b_,
                               int64_t begin, int64_t end, Lanes* scratch) {
  const int64_t b = B ? B : b_;
  for (int64_t first = begin * kTile; first < end * kTile && first < n; first += kTile) {
    const int64_t count = n - first < kTile ? n - first : kTile;
    forward_tile<piece_of(B)>(skew + first * (b * (b - 1) / 2), drop ? drop + first : nullptr,
                              blocks + first * b * b, count, b, scratch);
  }
}

template <int64_t B, class T>
BOFT_INLINE void backward_tiles(const T* blocks, const bool* drop, const T* grad, T* skew_grad,
                                int64_t n, int64_t b_, int64_t begin, int64_t end,
                                Lanes* scratch) {
  const int64_t b = B ? B : b_;
  for (int64_t first = begin * kTile; first < end * kTile && first < n; first += kTile) {
    const int64_t count = n - first < kTile ? n - first : kTile;
    backward_tile<piece_of(B)>(blocks + first * b * b, drop ? drop + first : nullptr,
                               grad + first * b * b, skew_grad + first * (b * (b - 1) / 2), count,
                               b, scratch);
  }
}

#define BOFT_SIZES(TILES, ...)                   \
  switch (b) {                                   \
    case 2: return TILES<2>(__VA_ARGS__);        \
    case 4: return TILES<4>(__VA_ARGS__);        \
    case 8: return TILES<8>(__VA_ARGS__);        \
    case 16: return TILES<16>(__VA_ARGS__);      \
    default: return TILES<0>(__VA_ARGS__);       \
  }
#define BOFT_DTYPE(SUFFIX, TARGET, T)                                                              \
  TARGET void forward_##SUFFIX(const T* skew, const bool* drop, T* blocks, int64_t n, int64_t b,   \
                               int64_t begin, int64_t end, Lanes* scratch) {                      \
    BOFT_SIZES(forward_tiles, skew, drop, blocks, n, b, begin, end, scratch)                       \
  }                                                                                                \
  TARGET void backward_##SUFFIX(const T* blocks, const bool* drop, const T* grad, T* skew_grad,    \
                                int64_t n, int64_t b, int64_t begin, int64_t end,                  \
                                Lanes* scratch) {                                                  \
    BOFT_SIZES(backward_tiles, blocks, drop, grad, skew_grad, n, b, begin, end, scratch)           \
  }
#define BOFT_DTYPES(SUFFIX, BYTES, TARGET) \
  BOFT_DTYPE(SUFFIX, TARGET, float)        \
  BOFT_DTYPE(SUFFIX, TARGET, double)       \
  BOFT_DTYPE(SUFFIX, TARGET, bf16)
BOFT_ISAS(BOFT_DTYPES)

// Memory for `count` Lanes, aligned to their size.
struct Scratch {
  std::vector<double> memory;
  Lanes* lanes;

  explicit Scratch(int64_t count) : memory(size_t((count + 1) * kTile)) {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    lanes = reinterpret_cast<Lanes*>((address + sizeof(Lanes) - 1) / sizeof(Lanes) * sizeof(Lanes));
  }
};

}  // namespace

void cayley(const void* skew, const bool* drop, void* blocks, int64_t n, int64_t b, int64_t begin,
            int64_t end, DType dtype) {
  const int64_t size = padded(b, 4);
  Scratch scratch(size * size + 16 + b * (b - 1) / 2 + (b * b + b + kTile - 1) / kTile);
  const auto as = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    BOFT_RUN(forward, static_cast<const T*>(skew), drop, static_cast<T*>(blocks), n, b, begin, end,
             scratch.lanes);
  };
  switch (dtype) {
    case DType::F32: return as(static_cast<float*>(nullptr));
    case DType::F64: return as(static_cast<double*>(nullptr));
    case DType::BF16: return as(static_cast<bf16*>(nullptr));
  }
}

void cayley_backward(const void* blocks, const bool* drop, const void* grad, void* skew_grad,
                     int64_t n, int64_t b, int64_t begin, int64_t end, DType dtype) {
  Scratch scratch(3 * padded(b, 4) * padded(b, 4));
  const auto as = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    BOFT_RUN(backward, static_cast<const T*>(blocks), drop, static_cast<const T*>(grad),
             static_cast<T*>(skew_grad), n, b, begin, end, scratch.lanes);
  };
  switch (dtype) {
    case DType::F32: return as(static_cast<float*>(nullptr));
    case DType::F64: return as(static_cast<double*>(nullptr));
    case DType::BF16: return as(static_cast<bf16*>(nullptr));
  }
}

}  // namespace boft::cpu
