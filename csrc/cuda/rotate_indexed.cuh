// Rows times the stage of an adapter, which each row names: many adapters in one launch.
#pragma once

#include "rotate.cuh"

namespace boft::cuda {

// Computes y = x S, or x S^T if job.transpose, where S is the stage of a row's adapter. A tile of
// rows is multiplied once for each adapter that occurs in it, in ascending order; only the rows of
// that adapter are changed. The stage of the last adapter stays in shared memory for the next tile,
// so the kernel is fastest if rows of one adapter are neighbors.
//   x, y: (n_rows, d);  matrices: (n_adapters, d / size, size, size);  index: (n_rows,)
template <class T, int Columns>
__global__ void __launch_bounds__(32 * kWarps<T>, 1)
    rotate_indexed_kernel(const T* x, const Wide<T>* matrices, const int32_t* index, T* y,
                          int n_adapters, Job job) {
  static_assert(Columns % 16 == 0 && Columns <= 128);
  const Layout& l = job.layout;
  constexpr int kAtOnce = kWarps<T> * kRows;
  const int warp = int(threadIdx.x) / 32;
  const int tile = int(blockIdx.x) % (l.tiles * job.parts);
  const int64_t first = int64_t(blockIdx.x) / (l.tiles * job.parts) * job.rows_per_block;
  const int64_t last =
      first + job.rows_per_block < job.n_rows ? first + job.rows_per_block : job.n_rows;
  const Origin origin = origin_of(l, tile / job.parts, job.d);
  const int from = tile % job.parts * Columns, width = l.bands * l.padded;
  const int until = job.parts > 1 ? from + Columns : width;
  const int pitch = width + kPad<T>, stage_pitch = l.padded + kPad<T>;
  T* stage = reinterpret_cast<T*>(shared_memory());
  T* rows = stage + l.bands * Columns * stage_pitch;
  int* adapters = reinterpret_cast<int*>(rows + kAtOnce * pitch);  // adapters of the tile's rows
  clear(rows, int64_t(kAtOnce) * pitch);
  __syncthreads();
  rows += warp * kRows * pitch;
  int loaded = -1;  // the adapter whose stage is in shared memory
  for (int64_t row = first; row < last; row += kAtOnce) {
    load_rows(rows, pitch, x, row + warp * kRows, last, job.d, l, origin, 0, width, kRows);
    close_copies();
    for (int i = int(threadIdx.x); i < kAtOnce; i += 32 * kWarps<T>)
      adapters[i] = row + i < last ? index[row + i] : -1;
    await_copies<0>();
    __syncthreads();
    const auto next = [&](int after) {  // least adapter above `after`; the same for all threads
      int least = n_adapters;
      for (int i = 0; i < kAtOnce; ++i)
        if (adapters[i] > after && adapters[i] < least) least = adapters[i];
      return least;
    };
    const int* own = adapters + warp * kRows;
    for (int adapter = next(-1); adapter < n_adapters; adapter = next(adapter)) {
      if (adapter != loaded) {
        __syncthreads();  // every warp has used the last one
        load_stage<T, Columns>(stage, stage_pitch, matrices + adapter * job.d * l.size, l, origin,
                               from, job.transpose);
        __syncthreads();
        loaded = adapter;
      }
      bool any = false;
      for (int i = 0; i < kRows; ++i) any = any || own[i] == adapter;
      if (any)
        rotate_in_place<T, Columns>(rows, pitch, stage, stage_pitch, l, from,
                                    [&](int i) { return own[i] == adapter; });
      __syncwarp();  // each row is changed for one adapter only, so no product reads a result
    }
    for (int i = 0; i < kRows; ++i)  // rows that name no adapter, and not -1
      if (own[i] < -1 || own[i] >= n_adapters)
        for (int at = int(threadIdx.x) % 32; at < width; at += 32)
          rows[i * pitch + at] = narrow<T>(nanf(""));
    __syncwarp();
    store_rows(rows, pitch, y, row + warp * kRows, last, job.d, l, origin, job.parts > 1 ? from : 0,
               until, kRows);
    __syncthreads();  // before rows and their adapters are loaded again
  }
}

}  // namespace boft::cuda
