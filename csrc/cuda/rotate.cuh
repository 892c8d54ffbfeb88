// Rows times a stage, in one pass over the rows. These kernels, and those of the gradients in
// gram.cuh, take any stage; halves.cuh has faster ones for groups of at most 64 halves.
//
// A block of threads has one tile of features (rows.cuh) and many rows. It keeps the stage's
// matrices in shared memory and streams the rows past them. Halves are multiplied by tensor cores
// and summed in float32; float32 and float64 by ordinary multiply-adds, with the same entries in
// each lane: with g = lane / 4 and t = lane % 4, a lane holds rows g, g + 8 and columns 2t, 2t + 1
// of every 16 x 8 result.
#pragma once

#include "rows.cuh"

namespace boft::cuda {

constexpr int kRows = 16;  // rows that a warp multiplies at a time

// Warps of a block of threads. float64 takes twice the memory of float32.
template <class T>
constexpr int kWarps = std::is_same_v<T, double> ? 2 : 4;
// Positions of a tile of x in gram_of(): 16 for each warp.
template <class T>
constexpr int kPositions = 16 * kWarps<T>;

// Arguments of a launch, the same for all blocks of threads.
struct Job {
  int64_t n_rows, d, rows_per_block;
  Layout layout;
  int parts;    // parts of the columns of a band, each of which has blocks of threads of its own
  int buffers;  // buffers of rows, 1 or 2; with two, a warp loads while it multiplies
  bool transpose;
};

// Loads the matrix of the stage for columns [from, from + Columns) of every band of a tile, as
// stage[band][column][inner] in the dtype of the rows, transposed if `transpose`. For halves the
// identity is subtracted, and y = x + x (R - I) is computed, since R itself rounded to 8 or 11 bits
// would lose a small rotation. Positions without a feature, and pairs of different groups, become
// zero.
//   matrices: (d / size, size, size);  pitch: distance of the columns of `stage`
template <class T, int Columns>
__device__ void load_stage(T* stage, int pitch, const Wide<T>* matrices, const Layout& l,
                           const Origin& origin, int from, bool transpose) {
  using W = Wide<T>;
  const int count = l.bands * Columns * l.padded;
  for (int index = int(threadIdx.x); index < count; index += int(blockDim.x)) {
    // Neighboring threads read neighboring entries of a row of the matrix.
    const int fast = index % (transpose ? l.padded : Columns);
    const int slow = index / (transpose ? l.padded : Columns);
    const int column = transpose ? slow % Columns : fast;
    const int inner = transpose ? fast : slow % l.padded;
    const int band = slow / (transpose ? Columns : l.padded);
    const int to = from + column;
    const int group = band * l.per_band + to / l.size;
    const bool inside = to < l.per_band * l.size && inner / l.size == to / l.size &&
                        inner < l.per_band * l.size && group < origin.groups;
    W value = 0;
    if (inside) {
      const int row = (transpose ? to : inner) % l.size, at = (transpose ? inner : to) % l.size;
      value = matrices[(origin.group + group) * l.size * l.size + row * l.size + at];
      if (is_half<T> && inner == to) value -= W(1);
    }
    stage[(band * Columns + column) * pitch + inner] = narrow<T>(value);
  }
}

// Two neighboring halves as a register of mma().
__device__ __forceinline__ uint32_t pair_at(const void* halves) {
  return *static_cast<const uint32_t*>(halves);
}

// Adds rows (16, padded) times stage (padded, Columns) to sums, for a warp. sums[n] has a lane's
// entries of columns [8n, 8n + 8), in the order of c in mma(). `stage` is stored by columns, as
// load_stage does.
template <class T, int Columns>
__device__ __forceinline__ void multiply(Wide<T> (&sums)[Columns / 8][4], const T* rows, int pitch,
                                         const T* stage, int stage_pitch, int padded) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const T *low = rows + g * pitch, *high = low + 8 * pitch;
  if constexpr (is_half<T>) {
    for (int k = 0; k < padded; k += 16) {
      const uint32_t a[4] = {pair_at(low + k + 2 * t), pair_at(high + k + 2 * t),
                             pair_at(low + k + 2 * t + 8), pair_at(high + k + 2 * t + 8)};
#pragma unroll
      for (int n = 0; n < Columns / 8; ++n) {
        const T* column = stage + (8 * n + g) * stage_pitch + k + 2 * t;
        mma<T>(sums[n], a, pair_at(column), pair_at(column + 8));
      }
    }
  } else {
    struct alignas(16) Vector {
      T at[kVectors<T>];
    };
    const auto vector = [](const T* p) { return *reinterpret_cast<const Vector*>(p); };
    for (int k = 0; k < padded; k += kVectors<T>) {
      const Vector a = vector(low + k), b = vector(high + k);
#pragma unroll
      for (int n = 0; n < Columns / 8; ++n) {
        const T* column = stage + (8 * n + 2 * t) * stage_pitch + k;
        const Vector c = vector(column), e = vector(column + stage_pitch);
#pragma unroll
        for (int i = 0; i < kVectors<T>; ++i) {
          sums[n][0] += a.at[i] * c.at[i];
          sums[n][1] += a.at[i] * e.at[i];
          sums[n][2] += b.at[i] * c.at[i];
          sums[n][3] += b.at[i] * e.at[i];
        }
      }
    }
  }
}

// Predicate that is true for every row.
struct AllRows {
  __device__ bool operator()(int) const { return true; }
};

// Factor of one for every row.
struct NoFactor {
  __device__ int operator()(int) const { return 1; }
};

// Multiplies a warp's 16 rows by the stage, and row i by factor(i), in place: columns
// [from, from + Columns) of every band, of those rows for which select(row) is true.
template <class T, int Columns, class Select = AllRows, class Factor = NoFactor>
__device__ void rotate_in_place(T* rows, int pitch, const T* stage, int stage_pitch,
                                const Layout& l, int from, Select select = {},
                                Factor factor = {}) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  for (int band = 0; band < l.bands; ++band) {
    T* left = rows + band * l.padded;
    T* out = left + from + g * pitch + 2 * t;
    const int columns = l.padded - from;  // the last part may be narrower than Columns
    Wide<T> sums[Columns / 8][4] = {};
    if constexpr (is_half<T>) {
#pragma unroll
      for (int n = 0; n < Columns / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (8 * n < columns) sums[n][i] = widen(out[i / 2 * 8 * pitch + 8 * n + i % 2]);
    }
    multiply<T, Columns>(sums, left, pitch, stage + band * Columns * stage_pitch, stage_pitch,
                         l.padded);
    __syncwarp();  // every lane has read the rows
#pragma unroll
    for (int n = 0; n < Columns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (8 * n < columns && select(g + i / 2 * 8))
          out[i / 2 * 8 * pitch + 8 * n + i % 2] =
              narrow<T>(sums[n][i] * Wide<T>(factor(g + i / 2 * 8)));
  }
}

// Fills shared memory with zeros, with all threads of a block.
template <class T>
__device__ void clear(T* memory, int64_t count) {
  for (int64_t i = int(threadIdx.x); i < count; i += int(blockDim.x)) memory[i] = narrow<T>(0.0f);
}

// Computes y = x S, or x S^T if job.transpose. Warps do not wait for each other after the stage is
// loaded: each loads, multiplies and stores 16 rows at a time, in buffers of its own.
//   x, y: (n_rows, d);  matrices: (d / size, size, size)
//   factor: (n_rows,), of each row of y; unused unless Factor
//   Columns: columns of a part, so that `parts` blocks of threads share the columns of a band
template <class T, int Columns, bool Factor>
__global__ void __launch_bounds__(32 * kWarps<T>, 1)
    rotate_kernel(const T* x, const Wide<T>* matrices, const Wide<T>* factor, T* y, Job job) {
  static_assert(Columns % 16 == 0 && Columns <= 128);
  const Layout& l = job.layout;
  const int warp = int(threadIdx.x) / 32;
  const int tile = int(blockIdx.x) % (l.tiles * job.parts);
  const int64_t first = int64_t(blockIdx.x) / (l.tiles * job.parts) * job.rows_per_block;
  const int64_t last =
      first + job.rows_per_block < job.n_rows ? first + job.rows_per_block : job.n_rows;
  const Origin origin = origin_of(l, tile / job.parts, job.d);
  const int from = tile % job.parts * Columns, width = l.bands * l.padded;
  const int pitch = width + kPad<T>, stage_pitch = l.padded + kPad<T>;
  T* stage = reinterpret_cast<T*>(shared_memory());
  T* buffers = stage + l.bands * Columns * stage_pitch;
  load_stage<T, Columns>(stage, stage_pitch, matrices, l, origin, from, job.transpose);
  clear(buffers, int64_t(job.buffers) * kWarps<T> * kRows * pitch);
  __syncthreads();
  buffers += warp * job.buffers * kRows * pitch;
  const int until = job.parts > 1 ? from + Columns : width;
  const int64_t step = kWarps<T> * kRows;
  int64_t row = first + warp * kRows;
  const auto load = [&](int64_t at, int turn) {
    if (at < last)
      load_rows(buffers + turn % job.buffers * kRows * pitch, pitch, x, at, last, job.d, l, origin,
                0, width, kRows);
    close_copies();
  };
  if (job.buffers == 2) load(row, 0);
  for (int turn = 0; row < last; row += step, ++turn) {
    if (job.buffers == 2) {
      load(row + step, turn + 1);
      await_copies<1>();
    } else {
      load(row, turn);
      await_copies<0>();
    }
    __syncwarp();
    T* rows = buffers + turn % job.buffers * kRows * pitch;
    if constexpr (Factor)
      rotate_in_place<T, Columns>(rows, pitch, stage, stage_pitch, l, from, AllRows{}, [&](int i) {
        return row + i < last ? factor[row + i] : Wide<T>(1);
      });
    else
      rotate_in_place<T, Columns>(rows, pitch, stage, stage_pitch, l, from);
    __syncwarp();
    store_rows(rows, pitch, y, row, last, job.d, l, origin, job.parts > 1 ? from : 0, until, kRows);
    __syncwarp();  // before it is loaded again
  }
}

// The rest runs on the host: sizes of launches.

constexpr int64_t kBlocks = 1024;             // blocks of threads that keep a large GPU busy
constexpr size_t kEnoughShared = 100 * 1024;  // with more, two would not fit a multiprocessor

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// Calls f(std::integral_constant<int, Columns>{}) with the columns that a block of threads
// multiplies at a time: at most Most, which is 32 for float64, because the registers hold no more
// sums.
template <int Most, class F>
int with_columns(int64_t size, F f) {
  if (size <= 16) return f(std::integral_constant<int, 16>{});
  if (size <= 32 || Most == 32) return f(std::integral_constant<int, 32>{});
  if constexpr (Most >= 64) {
    if (size <= 64 || Most == 64) return f(std::integral_constant<int, 64>{});
    if constexpr (Most >= 128) return f(std::integral_constant<int, 128>{});
  }
  return kInvalidValue;
}
template <class T>
constexpr int kMostColumns = is_half<T> ? 128 : kPositions<T>;

// Number of rows of a block of threads, a multiple of `step`, if `tiles` blocks make up a row. A
// block reads size^2 numbers of the stage for rows * size numbers of x; 16 * size rows make that
// cheap. There are fewer if multiprocessors would be idle else.
inline int64_t rows_of(int64_t tiles, int64_t rows, int64_t size, int64_t step) {
  const int64_t most = std::max<int64_t>(256, 16 * size) / step;
  const int64_t turns = std::min(most, tiles * divide_up(rows, step) / kBlocks);
  return step * std::max<int64_t>(1, turns);
}

// Bytes of shared memory of the kernels that multiply rows by a stage, for the stage and the rows.
template <class T, int Columns>
size_t shared_of(const Job& job) {
  const Layout& l = job.layout;
  return sizeof(T) * size_t(l.bands * Columns * (l.padded + kPad<T>) +
                            job.buffers * kWarps<T> * kRows * (l.bands * l.padded + kPad<T>));
}

// Division of x among the blocks of threads of these kernels; sets *blocks to their number.
// `pointers` are the addresses of all tensors of rows, combined by bitwise or.
template <class T, int Columns>
Job job_of(const Stage& stage, int64_t rows, int64_t d, bool transpose, uintptr_t pointers,
           int buffers, int64_t* blocks) {
  const int padded = int(divide_up(stage.size, kBand) * kBand);
  Job job{rows, d, 0, {}, int(divide_up(padded, Columns)), buffers, transpose};
  // More bands make longer runs where those of one group have less than the 32 bytes of a
  // transaction.
  const int64_t run = int64_t(sizeof(T)) * stage.chunk;
  const int64_t bands =
      std::min(divide_up(32, run), divide_up(stage.stride, kBand / stage.size + 1));
  const int positions = stage.stride > 1 && job.parts == 1 ? int(bands) * padded : 0;
  job.layout = layout_of<T>(stage, d, std::max(64, positions), pointers);
  const auto too_much = [&] { return shared_of<T, Columns>(job) > kEnoughShared; };
  if (too_much()) job.layout = layout_of<T>(stage, d, 64, pointers);
  if (too_much()) job.buffers = 1;
  const int64_t tiles = int64_t(job.layout.tiles) * job.parts;
  job.rows_per_block = rows_of(tiles, rows, stage.size, kWarps<T> * kRows);
  *blocks = tiles * divide_up(rows, job.rows_per_block);
  return job;
}

}  // namespace boft::cuda
