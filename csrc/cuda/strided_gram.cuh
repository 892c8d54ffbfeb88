// Gradients of rows of halves times a stage of 64 features whose chunks of 4 lie apart, in one pass
// over the rows: x^T grad of each group, and grad times the transposed matrices.
//
// Blocks of threads, strips of rows and operands are those of strided.cuh, with strips of x and of
// grad beside each other. A warp sums the Gram matrix of its group in 128 registers a lane. The sum
// is over rows, so an operand of mma() is a pair of rows of one feature. With g = lane / 4 and
// t = lane % 4, a lane reads chunks g and g + 8 of rows t, t + 4, t + 8 and t + 12, and pairs the
// rows: row tile j of the result is feature j of all 16 chunks, and so are column tiles 2 j and
// 2 j + 1. No entry is computed twice or in vain, and lanes exchange nothing.
#pragma once

#include "strided.cuh"

namespace boft::cuda {

constexpr int kPairRows = 16;  // rows of x and of grad in a strip

// Operands of a lane for the products of 16 rows and of 8 chunks, one for each g: words[j][k] has
// feature j of the chunk in rows t + 8 k and t + 8 k + 4.
struct RowPairs {
  uint32_t words[4][2];
};

// Loads the operands of 16 rows of a strip; the lane's chunk of row t lies `at` there.
template <class T>
__device__ __forceinline__ RowPairs load_pairs(const T* strip, int at) {
  const int odd = at ^ 16;  // four rows on, exchanged() differs in one bit
  RowPairs out;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const uint2 a = *reinterpret_cast<const uint2*>(strip + at + 8 * k * kStripRow);
    const uint2 b = *reinterpret_cast<const uint2*>(strip + odd + (8 * k + 4) * kStripRow);
    out.words[0][k] = low_halves(a.x, b.x);
    out.words[1][k] = high_halves(a.x, b.x);
    out.words[2][k] = low_halves(a.y, b.y);
    out.words[3][k] = high_halves(a.y, b.y);
  }
  return out;
}

// Adds x^T grad of 16 rows of a group to sums, for a warp.
template <class T>
__device__ __forceinline__ void add_gram(float (&sums)[4][8][4], const T* x, const T* grad,
                                         int at) {
  constexpr int kHigh = kStripRow / 2;  // 8 chunks on
  const RowPairs low = load_pairs(x, at), high = load_pairs(x + kHigh, at);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const RowPairs right = load_pairs(grad + half * kHigh, at);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t left[4] = {low.words[j][0], high.words[j][0], low.words[j][1],
                                high.words[j][1]};
#pragma unroll
      for (int n = 0; n < 4; ++n)
        mma<T>(sums[j][2 * n + half], left, right.words[n][0], right.words[n][1]);
    }
  }
  __syncwarp();  // every lane has read the rows
}

struct alignas(16) FourSums {
  float at[4];
};

// Stores the sums of a warp, transposed if `transpose`.
//   to: (8, 64, 64), one matrix for each warp
__device__ __forceinline__ void store_gram(const float (&sums)[4][8][4], float* to,
                                           bool transpose) {
  const unsigned thread = unsigned(unknown(int(threadIdx.x))), g = thread / 4 % 8, t = thread % 4;
  to += thread / 32 * (kApart * kApart);
  to += transpose ? 8 * kApart * t + 4 * g : 4 * kApart * g + 8 * t;
#pragma unroll
  for (int high = 0; high < 2; ++high)  // of the chunks of x
#pragma unroll
    for (int half = 0; half < 2; ++half)  // of the chunks of grad
#pragma unroll
      for (int next = 0; next < 2; ++next)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          FourSums row;
#pragma unroll
          for (int n = 0; n < 4; ++n)
            row.at[n] = transpose ? sums[n][2 * j + half][2 * high + next]
                                  : sums[j][2 * n + half][2 * high + next];
          const int left = 32 * high, right = 32 * half + 4 * next;  // features
          const int at = transpose ? (right + j) * kApart + left : (left + j) * kApart + right;
          *reinterpret_cast<FourSums*>(to + at) = row;
        }
}

// Computes x^T grad of every group over one range of the rows, and with XGrad also x_grad.
//   x, grad, x_grad: (n_rows, d);  matrices: (d / 64, 64, 64);  stride: a multiple of 8
//   partials: (ranges, d / 64, 64, 64), of which each block of threads writes 8 groups of one range
template <class T, bool XGrad>
__global__ void __launch_bounds__(kApartThreads, 1)
    gram_strided_kernel(const T* x, const T* grad, const float* matrices, T* x_grad,
                        float* partials, int n_rows, int d, int stride, int rows_per_block,
                        bool transpose) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int tiles = d / kStripRow;
  const int tile = int(blockIdx.x) % tiles;
  const int origin = tile_origin(tile, stride);
  const int first = int(blockIdx.x) / tiles * rows_per_block;
  const int end = n_rows - first < rows_per_block ? n_rows : first + rows_per_block;
  T* const strips = reinterpret_cast<T*>(shared_memory());
  constexpr int kMoves = kPairRows / kRowStep, kStrip = kPairRows * kStripRow;
  // Calls f(place, at, exists) for each vector that this thread copies of rows from `from` on: its
  // place in a strip, its index in x, and true if its row exists. No register is left to keep what
  // is computed here from one strip to the next.
  const auto for_each = [&](int from, auto f) {
    const unsigned thread = unsigned(unknown(int(threadIdx.x)));
    const unsigned unit = thread % kUnits, row = thread / kUnits;
    const int place = int(row) * kStripRow + exchanged(unit, row) * 8;
    const int feature = origin + unit_offset(unit, stride);
    const int64_t base = int64_t(from + int(row)) * d + feature;
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {  // four rows on, `exchanged` differs in one bit
      const int at = from + int(row) + i * kRowStep;
      f((i % 2 == 0 ? place : place ^ 16) + i * kRowStep * kStripRow,
        base + int64_t(unsigned(i * kRowStep) * unsigned(d)), at < end);
    }
  };
  const auto load = [&](int from, int turn) {
    T* const of_x = strips + turn % kStrips * 2 * kStrip;
    T* const of_grad = of_x + kStrip;
    for_each(from, [&](int place, int64_t at, bool exists) {
      copy_async_or_zeros(of_x + place, x + at, exists);  // zeros add nothing to the sums
      copy_async_or_zeros(of_grad + place, grad + at, exists);
    });
    close_copies();
  };
#pragma unroll
  for (int i = 0; i < kStrips - 1; ++i) load(first + i * kPairRows, i);
  uint32_t words[kApartWords];
  if constexpr (XGrad)
    load_operands<T>(words, matrices + int64_t(tile * kTogether + warp) * kApart * kApart,
                     !transpose);
  float sums[4][8][4] = {};
  for (int from = first, turn = 0; from < end; from = unknown(from + kPairRows), ++turn) {
    await_copies<kStrips - 2>();
    __syncthreads();  // the rows are there, and every thread has stored those before
    load(from + (kStrips - 1) * kPairRows, turn + kStrips - 1);
    T* const of_x = strips + turn % kStrips * 2 * kStrip;
    T* const of_grad = of_x + kStrip;
    const unsigned own = unsigned(unknown(lane));
    const int paired = group_at(own % 4, own / 4, warp), rotated = group_at(own / 4, own % 4, warp);
    add_gram<T>(sums, of_x, of_grad, paired);
    if constexpr (XGrad) {
      rotate_group<T>(words, of_grad + rotated);
      __syncthreads();  // every warp has rotated its group
      for_each(from, [&](int place, int64_t at, bool exists) {
        if (exists)
          *reinterpret_cast<uint4*>(x_grad + at) =
              *reinterpret_cast<const uint4*>(of_grad + place);
      });
    }
  }
  store_gram(sums, partials + int64_t(blockIdx.x) * kTogether * kApart * kApart, transpose);
}

// Adds up `terms` neighboring matrices to each one of sums, in order.
//   partials: (n_sums, terms, count);  sums: (n_sums, count);  count: of 4 numbers each
__global__ void __launch_bounds__(kApartThreads)
    sum_ranges_kernel(const FourSums* partials, FourSums* sums, int64_t count, int64_t n_sums,
                      int terms) {
  const int64_t at = int64_t(blockIdx.x) * kApartThreads + threadIdx.x;
  if (at >= n_sums * count) return;
  const FourSums* from = partials + at / count * terms * count + at % count;
  FourSums sum = *from;
#pragma unroll 4
  for (int term = 1; term < terms; ++term)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.at[i] += from[term * count].at[i];
  sums[at] = sum;
}

// The rest runs on the host: sizes of launches.

constexpr size_t kStridedGramShared = sizeof(uint16_t) * kStrips * 2 * kPairRows * kStripRow;
constexpr int64_t kLeastRange = 128;  // rows whose bytes are about those of the sums of a range

// Ranges that the rows of one split are cut into, so that there are enough blocks of threads. Each
// has a partial sum of its own.
inline int64_t strided_ranges(int64_t rows, int64_t d, int64_t splits) {
  const int64_t blocks = std::max<int64_t>(1, kStridedBlocks / (d / kStripRow * splits));
  return std::clamp<int64_t>(rows / (splits * kLeastRange), 1, blocks);
}

}  // namespace boft::cuda
