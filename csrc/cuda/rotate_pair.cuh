// Rows times two stages, which stay in shared memory in between: one read and one write of the rows.
//
// A *span* is what both stages together mix: the neighbouring features of one group of the stage with the
// larger reach, and with them whole groups of the other. A block of threads has one span and both stages'
// matrices of it, as halves in shared memory; each of its warps takes 16 rows of the span at a time, so
// that no warp waits for another between the stages. Rows lie there as in global memory: the
// permutation of a strided stage is where a lane looks for its columns.
#pragma once

#include "ptx.cuh"

namespace boft::cuda {

constexpr int kPairWarps = 4, kPairRows = 16;  // rows of a warp at a time
constexpr int kHalfPad = 8;  // of what is read in columns: the lanes of a warp hit different banks

struct PairStage {
  int size;
  Divisor chunk, stride;

  // First feature of a group of the span.
  __device__ int begin(int group) const {
    const int block = group / stride;
    return block * size * stride + (group - block * stride) * chunk;
  }
  // From there to a position in the group.
  __device__ int offset(int position) const {
    return position / chunk * chunk * stride + position % chunk;
  }
};

struct PairJob {
  int64_t n_rows, d, rows_per_block;
  PairStage stages[2];  // in the order in which the rows meet them
  int span, buffers;    // of rows, 1 or 2: two let a warp load while it multiplies
  Divisor in_row;       // what a lane moves at a time is so many of a row of the span,
  int at_once;          // and so many features: 8 where everything begins at multiples of 16 bytes
  bool transpose;
};

// Halves of shared memory for the matrices of a stage.
__host__ __device__ constexpr int pair_halves(int span, int size) {
  return span * (size + kHalfPad);
}

// The span's matrices minus the identity (as in rotate.cuh), as stage[group][row][column]. Loads are all
// on their way before the first of them is waited for; `vectors`: they begin at multiples of 16 bytes.
template <class T, int Size>
__device__ void load_pair_stage(T* stage, const float* matrices, int span, bool vectors) {
  constexpr int kBatch = 4;
  struct alignas(16) Four {
    float at[4];
  };
  const auto put = [&](int index, float value) {
    const int row = index / Size, column = index % Size;
    stage[row * (Size + kHalfPad) + column] =
        narrow<T>(value - (row % Size == column ? 1.0f : 0.0f));
  };
  const int count = span * Size / 4, threads = int(blockDim.x);
  if (!vectors) {
    for (int at = int(threadIdx.x); at < 4 * count; at += threads) put(at, matrices[at]);
    return;
  }
  for (int from = int(threadIdx.x); from < count; from += kBatch * threads) {
    Four values[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (from + i * threads < count)
        values[i] = reinterpret_cast<const Four*>(matrices)[from + i * threads];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (from + i * threads < count)
        for (int k = 0; k < 4; ++k) put(4 * (from + i * threads) + k, values[i].at[k]);
  }
}

// A warp's 16 rows of a span, in place, times a stage of this size. A lane (g, t) = (lane / 4, lane % 4)
// has rows g and g + 8, of every 8 positions 2t and 2t + 1: of its operand, and of its result.
template <class T, int Size, bool Transposed>
__device__ __forceinline__ void multiply_in_place(T* rows, int pitch, const T* stage,
                                                  const PairStage& s, int span) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  constexpr int kPitch = Size + kHalfPad;
  int offset[Size / 8];
#pragma unroll
  for (int n = 0; n < Size / 8; ++n) offset[n] = g * pitch + s.offset(8 * n + 2 * t);
  const auto pair = [](const T* halves) { return *reinterpret_cast<const uint32_t*>(halves); };
#pragma unroll 1
  for (int group = 0; group < span / Size; ++group) {
    T* const begin = rows + s.begin(group);
    const T* const matrix = stage + group * Size * kPitch;
    uint32_t operand[Size / 16][4];
#pragma unroll
    for (int k = 0; k < Size / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        operand[k][i] = pair(begin + offset[2 * k + i / 2] + i % 2 * 8 * pitch);
    __syncwarp();  // every lane has read the group
#pragma unroll
    for (int n = 0; n < Size / 8; n += 2) {
      float sums[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        sums[i / 4][i % 4] = widen(begin[offset[n + i / 4] + i / 2 % 2 * 8 * pitch + i % 2]);
#pragma unroll
      for (int k = 0; k < Size / 16; ++k) {
        uint32_t b[4];  // rows 16 k and 16 k + 8, of columns 8 n and then 8 n + 8
        if constexpr (Transposed) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            b[i] = pair(matrix + (8 * n + i / 2 * 8 + g) * kPitch + 16 * k + i % 2 * 8 + 2 * t);
        } else {
          const int part = lane / 8;
          load_transposed(b, matrix + (16 * k + part % 2 * 8 + lane % 8) * kPitch + 8 * n +
                                 part / 2 * 8);
        }
        mma<T>(sums[0], operand[k], b[0], b[1]);
        mma<T>(sums[1], operand[k], b[2], b[3]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
        begin[offset[n + i / 4] + i / 2 % 2 * 8 * pitch + i % 2] = narrow<T>(sums[i / 4][i % 4]);
    }
  }
}

// Calls f(row, feature of the span) for what a lane moves of a warp's rows, `at_once` features each and
// `in_row` times that a row.
template <class F>
__device__ __forceinline__ void for_each_of_rows(int rows, const Divisor& in_row, int at_once, F f) {
#pragma unroll 4
  for (int index = int(threadIdx.x) % 32; index < rows * in_row; index += 32)
    f(index / in_row, index % in_row * at_once);
}

// Calls f(std::integral_constant<int, size>{}).
template <class F>
__device__ __forceinline__ void with_pair_size(int size, F f) {
  if (size == 16) f(std::integral_constant<int, 16>{});
  else if (size == 32) f(std::integral_constant<int, 32>{});
  else f(std::integral_constant<int, 64>{});
}

template <class T>
__global__ void __launch_bounds__(32 * kPairWarps, 2)
    rotate_pair_kernel(const T* x, const float* first, const float* second, T* y, PairJob job) {
  const int warp = int(threadIdx.x) / 32, span = job.span, pitch = span + kHalfPad;
  const int spans = int(job.d / span), tile = int(blockIdx.x) % spans;
  const int64_t from = int64_t(blockIdx.x) / spans * job.rows_per_block;
  const int64_t until =
      from + job.rows_per_block < job.n_rows ? from + job.rows_per_block : job.n_rows;
  const PairStage &one = job.stages[0], &two = job.stages[1];
  T* const halves = reinterpret_cast<T*>(shared_memory());
  T* const more_halves = halves + pair_halves(span, one.size);
  T* const buffers =
      more_halves + pair_halves(span, two.size) + warp * job.buffers * kPairRows * pitch;
  with_pair_size(one.size, [&](auto size) {
    load_pair_stage<T, decltype(size)::value>(halves, first + int64_t(tile) * span * one.size, span,
                                              job.at_once > 1);
  });
  with_pair_size(two.size, [&](auto size) {
    load_pair_stage<T, decltype(size)::value>(more_halves, second + int64_t(tile) * span * two.size,
                                              span, job.at_once > 1);
  });
  __syncthreads();  // the matrices are there
  x += int64_t(tile) * span, y += int64_t(tile) * span;
  const auto count = [&](int64_t row) {
    return until - row < kPairRows ? int(until - row) : kPairRows;
  };
  const auto load = [&](int64_t row, int turn) {
    T* rows = buffers + turn % job.buffers * kPairRows * pitch;
    if (row < until && job.at_once > 1)
      for_each_of_rows(count(row), job.in_row, 8, [&](int i, int feature) {
        copy_async<16>(rows + i * pitch + feature, x + (row + i) * job.d + feature);
      });
    else if (row < until)
      for_each_of_rows(count(row), job.in_row, 1, [&](int i, int feature) {
        rows[i * pitch + feature] = x[(row + i) * job.d + feature];
      });
    close_copies();
  };
  constexpr int64_t kStep = kPairWarps * kPairRows;
  int64_t row = from + warp * kPairRows;
  if (job.buffers == 2) load(row, 0);
  for (int turn = 0; row < until; row += kStep, ++turn) {
    if (job.buffers == 2) {
      load(row + kStep, turn + 1);
      await_copies<1>();
    } else {
      load(row, turn);
      await_copies<0>();
    }
    T* rows = buffers + turn % job.buffers * kPairRows * pitch;
    for (int i = 0; i < 2; ++i) {
      __syncwarp();  // the rows are there, or the other stage's result
      const PairStage s = i == 0 ? one : two;
      const T* stage = i == 0 ? halves : more_halves;
      with_pair_size(s.size, [&](auto size) {
        constexpr int kSize = decltype(size)::value;
        if (job.transpose) multiply_in_place<T, kSize, true>(rows, pitch, stage, s, span);
        else multiply_in_place<T, kSize, false>(rows, pitch, stage, s, span);
      });
    }
    __syncwarp();  // before lanes store what others computed
    if (job.at_once > 1)
      for_each_of_rows(count(row), job.in_row, 8, [&](int i, int feature) {
        *reinterpret_cast<uint4*>(y + (row + i) * job.d + feature) =
            *reinterpret_cast<const uint4*>(rows + i * pitch + feature);
      });
    else
      for_each_of_rows(count(row), job.in_row, 1, [&](int i, int feature) {
        y[(row + i) * job.d + feature] = rows[i * pitch + feature];
      });
    __syncwarp();  // before it is loaded again
  }
}

}  // namespace boft::cuda
