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
  int size, chunk, stride;

  // First feature of a group of the span.
  __device__ int begin(int group) const {
    return stride == 1 ? group * size : group / stride * size * stride + group % stride * chunk;
  }
  // From there to a position in the group.
  __device__ int offset(int position) const {
    return stride == 1 ? position : position / chunk * stride * chunk + position % chunk;
  }
};

struct PairJob {
  int64_t n_rows, d, rows_per_block;
  PairStage stages[2];  // in the order in which the rows meet them
  int span, buffers;    // of rows, 1 or 2: two let a warp load while it multiplies
  bool transpose, vectors;  // whether rows begin at multiples of 16 bytes
};

// Halves of shared memory for the matrices of a stage.
__host__ __device__ constexpr int pair_halves(int span, int size) {
  return span * (size + kHalfPad);
}

// The span's matrices minus the identity (see load_stage), as stage[group][column][row].
template <class T>
__device__ void load_pair_stage(T* stage, const float* matrices, const PairStage& s, int span,
                                bool transpose) {
  const int pitch = s.size + kHalfPad;
  for (int index = int(threadIdx.x); index < span * s.size; index += int(blockDim.x)) {
    const int row = index / s.size % s.size, column = index % s.size;
    const float value = matrices[index] - (row == column ? 1.0f : 0.0f);
    const int group = index / s.size - row;  // times the size
    stage[(group + (transpose ? row : column)) * pitch + (transpose ? column : row)] =
        narrow<T>(value);
  }
}

// A warp's 16 rows of a span, in place, times a stage of this size. A lane (g, t) = (lane / 4, lane % 4)
// has rows g and g + 8, of every 8 positions 2t and 2t + 1: of its operand, and of its result.
template <class T, int Size>
__device__ __forceinline__ void multiply_in_place(T* rows, int pitch, const T* stage,
                                                  const PairStage& s, int span) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  int offset[Size / 8];
#pragma unroll
  for (int n = 0; n < Size / 8; ++n) offset[n] = g * pitch + s.offset(8 * n + 2 * t);
  const auto pair = [](const T* halves) { return *reinterpret_cast<const uint32_t*>(halves); };
#pragma unroll 1
  for (int group = 0; group < span / Size; ++group) {
    T* const begin = rows + s.begin(group);
    uint32_t operand[Size / 16][4];
#pragma unroll
    for (int k = 0; k < Size / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        operand[k][i] = pair(begin + offset[2 * k + i / 2] + i % 2 * 8 * pitch);
    __syncwarp();  // every lane has read the group
#pragma unroll
    for (int n = 0; n < Size / 8; ++n) {
      T *const low = begin + offset[n], *const high = low + 8 * pitch;
      float sums[4] = {widen(low[0]), widen(low[1]), widen(high[0]), widen(high[1])};
      const T* column = stage + (group * Size + 8 * n + g) * (Size + kHalfPad) + 2 * t;
#pragma unroll
      for (int k = 0; k < Size / 16; ++k)
        mma<T>(sums, operand[k], pair(column + 16 * k), pair(column + 16 * k + 8));
      low[0] = narrow<T>(sums[0]), low[1] = narrow<T>(sums[1]);
      high[0] = narrow<T>(sums[2]), high[1] = narrow<T>(sums[3]);
    }
  }
}

// Calls f(row, feature of the span) for what a lane moves of a warp's rows, `at_once` features each.
template <class F>
__device__ __forceinline__ void for_each_of_rows(int rows, int span, int at_once, F f) {
  const int in_row = span / at_once;
  for (int index = int(threadIdx.x) % 32; index < rows * in_row; index += 32)
    f(index / in_row, index % in_row * at_once);
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
  load_pair_stage(halves, first + int64_t(tile) * span * one.size, one, span, job.transpose);
  load_pair_stage(more_halves, second + int64_t(tile) * span * two.size, two, span, job.transpose);
  __syncthreads();  // the matrices are there
  x += int64_t(tile) * span, y += int64_t(tile) * span;
  const auto count = [&](int64_t row) {
    return until - row < kPairRows ? int(until - row) : kPairRows;
  };
  const auto load = [&](int64_t row, int turn) {
    T* rows = buffers + turn % job.buffers * kPairRows * pitch;
    if (row < until && job.vectors)
      for_each_of_rows(count(row), span, 8, [&](int i, int feature) {
        copy_async<16>(rows + i * pitch + feature, x + (row + i) * job.d + feature);
      });
    else if (row < until)
      for_each_of_rows(count(row), span, 1, [&](int i, int feature) {
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
      if (s.size == 16) multiply_in_place<T, 16>(rows, pitch, stage, s, span);
      else if (s.size == 32) multiply_in_place<T, 32>(rows, pitch, stage, s, span);
      else multiply_in_place<T, 64>(rows, pitch, stage, s, span);
    }
    __syncwarp();  // before lanes store what others computed
    if (job.vectors)
      for_each_of_rows(count(row), span, 8, [&](int i, int feature) {
        *reinterpret_cast<uint4*>(y + (row + i) * job.d + feature) =
            *reinterpret_cast<const uint4*>(rows + i * pitch + feature);
      });
    else
      for_each_of_rows(count(row), span, 1, [&](int i, int feature) {
        y[(row + i) * job.d + feature] = rows[i * pitch + feature];
      });
    __syncwarp();  // before it is loaded again
  }
}

}  // namespace boft::cuda
