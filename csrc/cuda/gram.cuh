// Gradients of rows times a stage, in one pass over the rows: x^T grad of each group, and grad times
// the transposed matrices.
#pragma once

#include "rotate.cuh"

namespace boft::cuda {

// Adds left^T right, summed over `rows` rows, to sums, for a warp: `left` has 16 columns, `right`
// Columns; rows lie `pitch` apart. `rows` is a multiple of 16 for halves.
template <class T, int Columns>
__device__ __forceinline__ void multiply_transposed(Wide<T> (&sums)[Columns / 8][4], const T* left,
                                                    const T* right, int pitch, int rows) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  if constexpr (is_half<T>) {
    const int matrix = lane / 8, r = lane % 8;
#pragma unroll 2
    for (int k = 0; k < rows; k += 16) {
      uint32_t a[4];
      load_transposed(a, left + (k + r + matrix / 2 * 8) * pitch + matrix % 2 * 8);
#pragma unroll
      for (int n = 0; n < Columns / 8; n += 2) {
        uint32_t b[4];
        load_transposed(b, right + (k + r + matrix % 2 * 8) * pitch + 8 * n + matrix / 2 * 8);
        mma<T>(sums[n], a, b[0], b[1]);
        mma<T>(sums[n + 1], a, b[2], b[3]);
      }
    }
  } else {
#pragma unroll 2
    for (int k = 0; k < rows; ++k) {
      const T a = left[k * pitch + g], b = left[k * pitch + g + 8];
#pragma unroll
      for (int n = 0; n < Columns / 8; ++n) {
        const T* c = right + k * pitch + 8 * n + 2 * t;
        sums[n][0] += a * c[0];
        sums[n][1] += a * c[1];
        sums[n][2] += b * c[0];
        sums[n][3] += b * c[1];
      }
    }
  }
}

// Number of blocks of threads that share the features of a row in gram_of().
__host__ __device__ inline int gram_tiles(const Job& job) {
  return job.layout.tiles * job.parts * job.parts;
}

// Computes x^T grad of the groups of one tile over rows [first, last). Each warp loads 16 rows of a
// tile, and sums over the rows of all warps for 16 positions of x and all columns of their band of
// grad. With XGrad it also computes x_grad, as the rows of grad are at hand; groups have to fit in a
// tile then.
//   x, grad, x_grad: (n_rows, d);  matrices: (d / size, size, size)
//   partials: (sums, d / size, size, size), of which number `sum` is written
//   tile: from 0 to gram_tiles(job) - 1
template <class T, int Columns, bool XGrad>
__device__ __forceinline__ void gram_of(const T* x, const T* grad, const Wide<T>* matrices,
                                        T* x_grad, Wide<T>* partials, const Job& job, int tile,
                                        int64_t sum, int64_t first, int64_t last) {
  static_assert(Columns % 16 == 0 && Columns <= kPositions<T>);
  const Layout& l = job.layout;
  constexpr int kTile = kPositions<T>, kAtOnce = kWarps<T> * kRows;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int part = tile % (job.parts * job.parts);
  const Origin origin = origin_of(l, tile / (job.parts * job.parts), job.d);
  const int width = l.bands * l.padded < kTile ? l.bands * l.padded : kTile;
  const int left_from = part / job.parts * kTile, right_from = part % job.parts * kTile;
  constexpr int kPitch = kTile + kPad<T>;
  const int stage_pitch = l.padded + kPad<T>;
  T* buffers = reinterpret_cast<T*>(shared_memory());
  T* stage = buffers + job.buffers * 2 * kAtOnce * kPitch;
  clear(buffers, int64_t(job.buffers) * 2 * kAtOnce * kPitch);
  if (XGrad) load_stage<T, Columns>(stage, stage_pitch, matrices, l, origin, 0, !job.transpose);
  __syncthreads();
  const auto load = [&](int64_t at, int turn) {  // each warp its 16 rows
    T* to = buffers + turn % job.buffers * 2 * kAtOnce * kPitch + warp * kRows * kPitch;
    at += warp * kRows;
    load_rows(to, kPitch, x, at, last, job.d, l, origin, left_from, left_from + width, kRows);
    load_rows(to + kAtOnce * kPitch, kPitch, grad, at, last, job.d, l, origin, right_from,
              right_from + width, kRows);
    close_copies();
  };
  const int band = warp * 16 / l.padded;  // band of the warp's positions of x
  const bool busy = warp * 16 < width;
  Wide<T> sums[Columns / 8][4] = {};
  if (job.buffers == 2) load(first, 0);
  int turn = 0;
  for (int64_t row = first; row < last; row += kAtOnce, ++turn) {
    if (job.buffers == 2) {
      load(row + kAtOnce, turn + 1);
      await_copies<1>();
    } else {
      load(row, turn);
      await_copies<0>();
    }
    __syncthreads();
    T* left = buffers + turn % job.buffers * 2 * kAtOnce * kPitch;
    T* right = left + kAtOnce * kPitch;
    if (busy)
      multiply_transposed<T, Columns>(sums, left + warp * 16, right + band * l.padded, kPitch,
                                      kAtOnce);
    __syncthreads();  // every warp has read the rows
    if (XGrad) {
      T* own = right + warp * kRows * kPitch;
      rotate_in_place<T, Columns>(own, kPitch, stage, stage_pitch, l, 0);
      __syncwarp();
      store_rows(own, kPitch, x_grad, row + warp * kRows, last, job.d, l, origin, 0, width, kRows);
      __syncwarp();  // before it is loaded again
    }
  }
  if (!busy) return;
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < Columns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int inner = left_from + warp * 16 - band * l.padded + g + i / 2 * 8;
      const int to = right_from + 8 * n + 2 * t + i % 2;
      const int most = l.per_band * l.size, group = band * l.per_band + inner / l.size;
      if (inner >= most || to >= most || inner / l.size != to / l.size || group >= origin.groups)
        continue;
      const int row = (job.transpose ? to : inner) % l.size;
      const int at = (job.transpose ? inner : to) % l.size;
      const int64_t matrix = sum * (job.d / l.size) + origin.group + group;
      partials[(matrix * l.size + row) * l.size + at] = sums[n][i];
    }
}

// Computes gram_of() over one split of the rows, a partial sum of the gradient of the stage.
//   partials: (splits, d / size, size, size)
template <class T, int Columns, bool XGrad>
__global__ void __launch_bounds__(32 * kWarps<T>, 1)
    gram_kernel(const T* x, const T* grad, const Wide<T>* matrices, T* x_grad, Wide<T>* partials,
                Job job) {
  const int64_t split = int64_t(blockIdx.x) / gram_tiles(job);
  const int64_t first = split * job.rows_per_block;
  const int64_t last =
      first + job.rows_per_block < job.n_rows ? first + job.rows_per_block : job.n_rows;
  gram_of<T, Columns, XGrad>(x, grad, matrices, x_grad, partials, job,
                             int(blockIdx.x) % gram_tiles(job), split, first, last);
}

// The rest runs on the host: sizes of launches.

// Rows that a block of threads takes at a time in gram_of().
template <class T>
constexpr int64_t kGramStep = kWarps<T> * kRows;
// Division of x among the blocks of threads that call gram_of(), without rows_per_block.
template <class T>
Job gram_job(const Stage& stage, int64_t rows, int64_t d, bool transpose, uintptr_t pointers) {
  const Layout layout = layout_of<T>(stage, d, kPositions<T>, pointers);
  const int parts = int(divide_up(layout.padded, kPositions<T>));
  return {rows, d, 0, layout, parts, is_half<T> ? 2 : 1, transpose};
}
// Bytes of shared memory of gram_of(), for the rows.
template <class T>
size_t gram_shared(const Job& job) {
  return sizeof(T) * size_t(job.buffers) * 2 * kGramStep<T> * (kPositions<T> + kPad<T>);
}

}  // namespace boft::cuda
