// Stage matrices from skew-symmetric parameters, and their gradient, for blocks of b = 2, 4, 8 in
// float32: the operator of stage_from_skew.cuh with a thread for each butterfly block.
//
// A block of threads has a *share*, which is the same number of neighboring blocks of every factor,
// and which makes up whole groups. A thread inverts one of these blocks in its registers (cayley.cuh)
// and puts R into shared memory. From there the factors are joined one after the other: factor i
// makes squares of 2 D = b 2^i rows from pairs of squares of D rows. The last squares are the
// matrices of the stage. They go from registers to global memory, the others to shared memory.
#pragma once

#include "shares.cuh"

namespace boft::cuda {

// Columns of a square that a thread works on at a time.
template <int B>
constexpr int kColumns = B < 4 ? 2 : 4;

// Part of the work on the squares of factor i > 0: block k of the factor, which is number `low` of
// square `high`, and some columns of that square. They lie in its left half (half = 0) or right half.
// Rows and columns of a half are those of a square of the product of the factors before i.
template <int B>
struct Part {
  static constexpr unsigned kHalf = B / 2;
  unsigned dense, high, low, half, column, block;

  // Part `index` of the work that `share` divides into pieces of kColumns columns.
  __device__ __forceinline__ static Part of(const Shares& s, int i, unsigned index) {
    const unsigned log_pieces = i + (B > kColumns<B>), k = index >> log_pieces;
    const unsigned piece = index & ((1u << log_pieces) - 1), half = piece >> (log_pieces - 1);
    return of_block(s, i, k, half, (piece - (half << (log_pieces - 1))) * kColumns<B>);
  }
  __device__ __forceinline__ static Part of_block(const Shares& s, int i, unsigned k, unsigned half,
                                                  unsigned column) {
    return {unsigned(B) << (i - 1), k >> i, k & ((1u << i) - 1), half, column,
            ((unsigned(i) << s.log_share) + k) * (B * B)};
  }
  // Number of parts of a share.
  __device__ __forceinline__ static unsigned count(const Shares& s, int i) {
    return s.count() << (i + (B > kColumns<B>));
  }
  // Position of entry (e, 0) of the block's half.
  __device__ __forceinline__ unsigned entry(int e) const { return block + e * B + half * kHalf; }
  // Position, among the squares before factor i, of the column's entry in row q of the half.
  __device__ __forceinline__ unsigned inner(int q) const {
    return ((2 * high + half) * dense + low * kHalf + q) * dense + column;
  }
  // Position, among the squares of factor i, of the column's entry in row e of the block.
  __device__ __forceinline__ unsigned outer(int e) const {
    const unsigned row = low * kHalf + (e < int(kHalf) ? e : dense + e - kHalf);
    return (high * 2 * dense + row) * 2 * dense + half * dense + column;
  }
};

// Multiplies factor i with `inner`, the squares of the factors before it. out(position, piece) takes
// the numbers of the result.
template <int B, class Out>
__device__ __forceinline__ void join_share(const Shares& s, int i, Numbers factors,
                                           Numbers inner, Out out) {
  constexpr int kHalf = B / 2, kWide = kColumns<B>;
  for (unsigned index = threadIdx.x; index < Part<B>::count(s, i); index += blockDim.x) {
    const auto part = Part<B>::of(s, i, index);
    Piece<kWide> rows[kHalf];
#pragma unroll
    for (int q = 0; q < kHalf; ++q) rows[q] = inner.piece<kWide>(part.inner(q));
#pragma unroll
    for (int e = 0; e < B; ++e) {
      const auto factor = factors.piece<kHalf>(part.entry(e));
      Piece<kWide> sum = {};
#pragma unroll
      for (int q = 0; q < kHalf; ++q)
#pragma unroll
        for (int v = 0; v < kWide; ++v) sum.at[v] += factor.at[q] * rows[q].at[v];
      out(part.outer(e), sum);
    }
  }
}

// Computes the gradient of factor i, and of `inner`, from that of their product, `grad`.
template <int B>
__device__ __forceinline__ void unjoin_share(const Shares& s, int i, Numbers factors,
                                             Numbers inner, Numbers grad,
                                             Numbers factors_grad, Numbers inner_grad) {
  constexpr int kHalf = B / 2, kWide = kColumns<B>;
  for (unsigned index = threadIdx.x; index < 2 * s.count(); index += blockDim.x) {
    auto part = Part<B>::of_block(s, i, index / 2, index % 2, 0);
    float sums[B][kHalf] = {};
    for (; part.column < part.dense; part.column += kWide) {
      Piece<kWide> rows[kHalf];
#pragma unroll
      for (int q = 0; q < kHalf; ++q) rows[q] = inner.piece<kWide>(part.inner(q));
#pragma unroll
      for (int e = 0; e < B; ++e) {
        const auto g = grad.piece<kWide>(part.outer(e));
#pragma unroll
        for (int q = 0; q < kHalf; ++q)
#pragma unroll
          for (int v = 0; v < kWide; ++v) sums[e][q] += g.at[v] * rows[q].at[v];
      }
    }
#pragma unroll
    for (int e = 0; e < B; ++e) {
      Piece<kHalf> row;
#pragma unroll
      for (int q = 0; q < kHalf; ++q) row.at[q] = sums[e][q];
      factors_grad.piece<kHalf>(part.entry(e)) = row;
    }
  }
  for (unsigned index = threadIdx.x; index < Part<B>::count(s, i); index += blockDim.x) {
    const auto part = Part<B>::of(s, i, index);
    Piece<kWide> rows[kHalf] = {};
#pragma unroll
    for (int e = 0; e < B; ++e) {
      const auto factor = factors.piece<kHalf>(part.entry(e));
      const auto g = grad.piece<kWide>(part.outer(e));
#pragma unroll
      for (int q = 0; q < kHalf; ++q)
#pragma unroll
        for (int v = 0; v < kWide; ++v) rows[q].at[v] += factor.at[q] * g.at[v];
    }
#pragma unroll
    for (int q = 0; q < kHalf; ++q) inner_grad.piece<kWide>(part.inner(q)) = rows[q];
  }
}

// Numbers of the blocks of a share in one factor.
template <int B>
__host__ __device__ constexpr unsigned numbers_of(int log_share) {
  return unsigned(B * B) << log_share;
}
// Numbers of the squares of factors 1, 2, .. i - 1: of 2 b, 4 b, .. rows. They lie one after another.
template <int B>
__host__ __device__ constexpr unsigned numbers_before(int i, int log_share) {
  return i < 2 ? 0 : numbers_of<B>(log_share) * ((1u << i) - 2);
}

// The squares of factor i, of which those from factor 1 on begin at `squares`.
template <int B>
__device__ __forceinline__ Numbers squares_of(const Shares& s, Numbers blocks, float* squares,
                                              int i) {
  return i == 0 ? blocks : Numbers{squares + numbers_before<B>(i, s.log_share)};
}

// Makes the squares of all factors but the last.
template <int B>
__device__ __forceinline__ void join_inner(const Shares& s, Numbers factors, float* squares) {
  for (int i = 1; i < s.m - 1; ++i) {
    const Numbers outer = squares_of<B>(s, factors, squares, i);
    join_share<B>(s, i, factors, squares_of<B>(s, factors, squares, i - 1),
                  [&](unsigned position, const auto& piece) {
                    outer.piece<kColumns<B>>(position) = piece;
                  });
    __syncthreads();
  }
}

// True if a thread has a block of the share, and its position in the tensors of blocks.
struct Own {
  bool exists;
  int64_t block;

  __device__ __forceinline__ explicit Own(const Shares& s) {
    const int thread = int(threadIdx.x), i = thread >> s.log_share;
    const int k = thread & ((1 << s.log_share) - 1);
    exists = i < s.m && k < int(s.count());
    block = i * s.n_blocks + s.first() + k;
  }
};

// Packed numbers that a thread reads and writes at once. A block has an odd number of such pieces, so
// that those of neighboring threads lie in different banks.
template <int B>
constexpr int kPackedPiece = kPacked<B> % 4 == 0 ? 4 : kPacked<B> % 2 == 0 ? 2 : 1;

// The thread's own packed numbers from number i on.
template <int B>
__device__ __forceinline__ Piece<kPackedPiece<B>>& packed_piece(float* shared, int i) {
  return *reinterpret_cast<Piece<kPackedPiece<B>>*>(shared + int(threadIdx.x) * kPacked<B> + i);
}

constexpr int kShareThreads = 64;  // that a share should have
// Most threads of a share, if one group has more blocks.
template <int B>
constexpr int kMostShareThreads = B == 8 ? kShareThreads : B == 4 ? 96 : 192;

// Computes blocks and stages; arguments as in boft::cuda::stage_from_skew.
template <int B>
__global__ void __launch_bounds__(kMostShareThreads<B>, B == 8 ? 6 : 4)
    stage_small_kernel(const float* skew, const bool* drop, float* blocks, float* stages,
                       Shares s) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const Numbers factors{shared};
  const Own own(s);
  load_share<kPacked<B>>(s, skew, [&](unsigned i) { return shared + i; });
  const bool dropped = own.exists && drop != nullptr && drop[own.block];
  await_copies<0>();
  __syncthreads();
  float values[kPacked<B>] = {};
  if (own.exists) {
#pragma unroll
    for (int i = 0; i < kPacked<B>; i += kPackedPiece<B>) {
      const auto piece = packed_piece<B>(shared, i);
#pragma unroll
      for (int k = 0; k < kPackedPiece<B>; ++k) values[i + k] = piece.at[k];
    }
  }
  double a[B][B];
  fill<B>(a, values, dropped);
  __syncthreads();  // every thread has read its parameters
  invert(a);
  if (own.exists) {
#pragma unroll
    for (int i = 0; i < B * B; i += 4) {
      Piece<4> four;
#pragma unroll
      for (int k = i; k < i + 4; ++k)
        four.at[k - i] = float(k / B == k % B ? a[k / B][k % B] - 1.0 : a[k / B][k % B]);
      factors.piece<4>(threadIdx.x * (B * B) + i) = four;
    }
  }
  __syncthreads();
  const auto place = [&](unsigned i) { return factors.at(i); };
  store_share<B * B>(s, blocks, place);
  if (s.m == 1) return store_share<B * B>(s, stages, place);
  float* const squares = shared + s.m * numbers_of<B>(s.log_share);
  join_inner<B>(s, factors, squares);
  const Numbers inner = squares_of<B>(s, factors, squares, s.m - 2);
  float* const out = stages + (s.first() * (B * B) << (s.m - 1));
  join_share<B>(s, s.m - 1, factors, inner, [&](unsigned position, const auto& piece) {
    if (s.vectors) {
      *reinterpret_cast<Piece<kColumns<B>>*>(out + position) = piece;
    } else {
#pragma unroll
      for (int v = 0; v < kColumns<B>; ++v) out[position + v] = piece.at[v];
    }
  });
}

// Adds up the partial sums of the gradient of the stage, (splits, d / size, size, size), of a share.
template <int B>
__device__ __forceinline__ void sum_share(const Shares& s, const float* grad, int64_t splits,
                                          Numbers to) {
  constexpr unsigned kAtOnce = 4;  // vectors of a thread
  const int64_t all = s.n_blocks * (B * B) << (s.m - 1);
  const float* from = grad + (s.first() * (B * B) << (s.m - 1));
  const unsigned count = s.count() * (B * B) << (s.m - 1), whole = s.vectors ? count / 4 * 4 : 0;
  const unsigned step = 4 * blockDim.x;
  for (unsigned first = 4 * threadIdx.x; first < whole; first += kAtOnce * step) {
    Piece<4> sums[kAtOnce] = {};
#pragma unroll 2  // loads under way at a time, of kAtOnce vectors each
    for (int64_t split = 0; split < splits; ++split)
#pragma unroll
      for (unsigned n = 0; n < kAtOnce; ++n)
        if (const unsigned i = first + n * step; i < whole) {
          const auto four = *reinterpret_cast<const Piece<4>*>(from + split * all + i);
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[n].at[k] += four.at[k];
        }
#pragma unroll
    for (unsigned n = 0; n < kAtOnce; ++n)
      if (const unsigned i = first + n * step; i < whole) to.piece<4>(i) = sums[n];
  }
  for (unsigned i = whole + threadIdx.x; i < count; i += blockDim.x) {
    float sum = 0;
    for (int64_t split = 0; split < splits; ++split) sum += from[split * all + i];
    *to.at(i) = sum;
  }
}

// Computes skew_grad; arguments as in boft::cuda::stage_from_skew_backward. Shared memory has the
// blocks, their gradients, the squares before the last factor, the gradients of these, and the
// gradient of the stage.
template <int B>
__global__ void __launch_bounds__(kMostShareThreads<B>, 4)
    stage_small_backward_kernel(const float* blocks, const bool* drop, const float* grad,
                                float* skew_grad, Shares s, int64_t splits) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const unsigned all_blocks = s.m * numbers_of<B>(s.log_share);
  const unsigned squares = numbers_before<B>(s.m - 1, s.log_share);
  const Numbers factors{shared}, factors_grad{shared + all_blocks};
  float* const products = factors_grad.begin + all_blocks;
  Numbers outer_grad{s.m == 1 ? factors_grad.begin : products + 2 * squares};
  const Own own(s);
  load_share<B * B>(s, blocks, [&](unsigned i) { return factors.at(i); });
  const bool dropped = own.exists && drop != nullptr && drop[own.block];
  sum_share<B>(s, grad, splits, outer_grad);
  await_copies<0>();
  __syncthreads();
  join_inner<B>(s, factors, products);
  for (int i = s.m - 1; i > 0; --i) {
    const Numbers inner_grad = squares_of<B>(s, factors_grad, products + squares, i - 1);
    unjoin_share<B>(s, i, factors, squares_of<B>(s, factors, products, i - 1), outer_grad,
                    factors_grad, inner_grad);
    __syncthreads();
    outer_grad = inner_grad;
  }
  float values[kPacked<B>] = {};
  if (own.exists)
    skew_gradient<B>(
        values, dropped, [&](auto f) { factors.read<B * B>(threadIdx.x * (B * B), f); },
        [&](auto f) { factors_grad.read<B * B>(threadIdx.x * (B * B), f); });
  __syncthreads();  // every thread has read its matrices
  if (own.exists) {
#pragma unroll
    for (int i = 0; i < kPacked<B>; i += kPackedPiece<B>) {
      auto& piece = packed_piece<B>(shared, i);
#pragma unroll
      for (int k = 0; k < kPackedPiece<B>; ++k) piece.at[k] = values[i + k];
    }
  }
  __syncthreads();
  store_share<kPacked<B>>(s, skew_grad, [&](unsigned i) { return shared + i; });
}

// The rest runs on the host: sizes of launches.

// Bytes of shared memory of the two kernels.
template <int B>
size_t small_bytes(int m, int log_share, bool backward) {
  const size_t blocks = size_t(m) * numbers_of<B>(log_share);
  const size_t squares = numbers_before<B>(m - 1, log_share);
  const size_t stage = m == 1 ? 0 : size_t(numbers_of<B>(log_share)) << (m - 1);
  return sizeof(float) * (backward ? 2 * blocks + 2 * squares + stage : blocks + squares);
}

// Chooses shares of at most 64 blocks and 64 KB of shared memory, but at least one group.
template <int B>
Shares shares_of(int64_t n_blocks, int m, bool vectors) {
  constexpr size_t kRoom = 64 * 1024;
  int log_share = m - 1;
  while (m << (log_share + 1) <= kShareThreads &&
         small_bytes<B>(m, log_share + 1, true) <= kRoom)
    ++log_share;
  return {n_blocks, m, log_share, vectors && n_blocks * kPacked<B> % 4 == 0};
}

// Threads of a block, in whole warps.
inline int threads_of(const Shares& s) { return ((s.m << s.log_share) + 31) / 32 * 32; }

}  // namespace boft::cuda
