// Rows of halves times a stage of 64 features whose chunks of 4 lie apart, at the speed of a copy.
//
// A chunk alone is 8 bytes, a quarter of what memory moves at least. A block of threads therefore
// takes 8 neighboring groups: their chunks number c make up 64 bytes. Rows come to shared memory and
// leave it in vectors of 16 bytes. In between each of 8 warps rotates the rows of its own group in
// place, with the stage in its registers.
//
// As in halves.cuh, the order of a product's inner positions and columns is free. With g = lane / 4
// and t = lane % 4, a lane reads chunk 4 s + t of rows g and g + 8 for inner step s: it declares the
// chunk to be inner positions 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. Column tiles 2 j and 2 j + 1 are
// numbered so that its results make up chunk 4 j + t of the same rows. Lanes exchange nothing.
#pragma once

#include "rotate.cuh"

namespace boft::cuda {

constexpr int kApart = 64;           // features of a group
constexpr int kChunks = kApart / 4;  // of a group
constexpr int kTogether = 8;         // groups of a block of threads, a warp each
constexpr int kApartThreads = 32 * kTogether;
constexpr int kStripRows = 32;                 // rows that are rotated at a time
constexpr int kStrips = 3;                     // of so many rows, in shared memory
constexpr int kStripRow = kTogether * kApart;  // halves of a row there
constexpr int kUnits = kStripRow / 8;          // vectors of a row, of which a thread copies one
constexpr int kRowStep = kApartThreads / kUnits;  // rows that are copied at once
static_assert(kRowStep == 4, "place() rests on it");

// Operands of a lane: words 2 (8 s + q) and the next one are b0 and b1 of mma() for inner step s and
// column tile q.
constexpr int kApartWords = kApart / 16 * (kApart / 8) * 2;

// Place in a row of its vector number `unit`. Vectors are exchanged within lines of 8, so that neither
// copies nor the lanes of a warp meet in one bank more often than they have to.
// Both are unsigned, because then the divisions are shifts.
__device__ __forceinline__ int exchanged(unsigned unit, unsigned row) {
  const unsigned k = row + unit / (kTogether / 2) * 2;
  return int(unit ^ (k % 2 * 4 + k / 2 % 4));
}

// Loads the operands of one group: the entries of R - I, or of its transpose. y = x + x (R - I) is
// computed, since R itself rounded to 8 or 11 bits would lose a small rotation.
template <class T>
__device__ __forceinline__ void load_operands(uint32_t (&words)[kApartWords], const float* matrix,
                                              bool transpose) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int down = transpose ? 1 : kApart, along = transpose ? kApart : 1;
#pragma unroll
  for (int s = 0; s < kApart / 16; ++s)
#pragma unroll
    for (int q = 0; q < kApart / 8; ++q)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int inner = 4 * (4 * s + t) + 2 * h;
        const int outer = 4 * (4 * (q / 2) + g / 2) + q % 2 * 2 + g % 2;
        const float* from = matrix + inner * down + outer * along;
        words[(s * (kApart / 8) + q) * 2 + h] =
            pack<T>(from[0] - float(inner == outer), from[down] - float(inner + 1 == outer));
        if (q % 4 == 3 && h == 1) __syncwarp();  // more loads at a time would take registers
      }
}

// Place in a strip of a chunk of the group that a warp has.
__device__ __forceinline__ int group_at(unsigned row, unsigned chunk, unsigned warp) {
  return int(row * kStripRow + warp % 2 * 4) +
         exchanged(chunk * (kTogether / 2) + warp / 2, row) * 8;
}

// Adds two numbers to a pair of halves.
template <class T>
__device__ __forceinline__ uint32_t add(uint32_t pair, const float* numbers) {
  float low, high;
  unpack<T>(pair, low, high);
  return pack<T>(low + numbers[0], high + numbers[1]);
}

// Rotates 16 rows of a group in place, for a warp. `own` is the address of chunk t in row g; 4
// chunks or 8 rows on, `exchanged` is the same.
template <class T>
__device__ __forceinline__ void rotate_group(const uint32_t (&words)[kApartWords], T* own) {
  const auto at = [&](int s, int high) {
    return reinterpret_cast<uint2*>(own + s * (kStripRow / 4) + 8 * high * kStripRow);
  };
  uint2 rows[kApart / 16][2];
#pragma unroll
  for (int s = 0; s < kApart / 16; ++s)
#pragma unroll
    for (int high = 0; high < 2; ++high) rows[s][high] = *at(s, high);
  // A lane overwrites what it has read itself, and nothing else.
#pragma unroll
  for (int j = 0; j < kApart / 16; ++j) {
    float sums[2][4] = {};
#pragma unroll
    for (int s = 0; s < kApart / 16; ++s) {
      const uint32_t a[4] = {rows[s][0].x, rows[s][1].x, rows[s][0].y, rows[s][1].y};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t* b = words + 2 * (s * (kApart / 8) + 2 * j + i);
        mma<T>(sums[i], a, b[0], b[1]);
      }
    }
#pragma unroll
    for (int high = 0; high < 2; ++high)
      *at(j, high) = {add<T>(rows[j][high].x, sums[0] + 2 * high),
                      add<T>(rows[j][high].y, sums[1] + 2 * high)};
  }
}

// First feature of the 8 groups of tile number `tile`, in a row of d features. The groups are those
// from 8 `tile` on.
__device__ __forceinline__ int tile_origin(int tile, int stride) {
  const int across = stride / kTogether;  // tiles whose chunks alternate
  return (tile / across * kChunks * stride + tile % across * kTogether) * 4;
}
// Distance from there of vector number `unit` of a row of a strip.
__device__ __forceinline__ int unit_offset(unsigned unit, int stride) {
  return int(unit / (kTogether / 2)) * stride * 4 + int(unit % (kTogether / 2)) * 8;
}

// Computes y = x S, or x S^T if `transpose`.
//   x, y: (n_rows, d);  matrices: (d / 64, 64, 64);  stride: distance of chunks, a multiple of 8
template <class T>
__global__ void __launch_bounds__(kApartThreads, 1)
    rotate_strided_kernel(const T* x, const float* matrices, T* y, int n_rows, int64_t d,
                          int stride, int rows_per_block, bool transpose) {
  const int tiles = int(d / kStripRow), tile = int(blockIdx.x) % tiles;
  const int first = int(blockIdx.x) / tiles * rows_per_block;
  const int rows_here = n_rows - first < rows_per_block ? n_rows - first : rows_per_block;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  T* const strips = reinterpret_cast<T*>(shared_memory());
  // This thread copies vector `unit` of rows row, row + 4, ..
  const int unit = int(threadIdx.x) % kUnits, row = int(threadIdx.x) / kUnits;
  const int64_t own =
      (first + row) * d + tile_origin(tile, stride) + unit_offset(unit, stride);
  const auto place = [&](int i) {  // four rows on, `exchanged` differs in one bit
    const int even = row * kStripRow + exchanged(unit, row) * 8;
    return (i % 2 == 0 ? even : even ^ 16) + i * kRowStep * kStripRow;
  };
  constexpr int kMoves = kStripRows / kRowStep;
  const auto load = [&](int from, int turn) {  // rows from `from` on
    T* to = strips + turn % kStrips * kStripRows * kStripRow;
#pragma unroll
    for (int i = 0; i < kMoves; ++i)
      if (from + row + i * kRowStep < rows_here)
        copy_async<16>(to + place(i), x + own + (from + i * kRowStep) * d);
    close_copies();
  };
#pragma unroll
  for (int i = 0; i < kStrips - 1; ++i) load(i * kStripRows, i);
  uint32_t words[kApartWords];
  load_operands<T>(words, matrices + int64_t(tile * kTogether + warp) * kApart * kApart, transpose);
  const int rotated = group_at(lane / 4, lane % 4, warp);
  for (int from = 0, turn = 0; from < rows_here; from += kStripRows, ++turn) {
    await_copies<kStrips - 2>();
    __syncthreads();  // the rows are there, and every thread has stored those before
    load(from + (kStrips - 1) * kStripRows, turn + kStrips - 1);
    T* const rows = strips + turn % kStrips * kStripRows * kStripRow;
#pragma unroll 1
    for (int half = 0; half < kStripRows / 16; ++half)
      rotate_group<T>(words, rows + 16 * half * kStripRow + rotated);
    __syncthreads();  // every warp has rotated its group
#pragma unroll
    for (int i = 0; i < kMoves; ++i)
      if (from + row + i * kRowStep < rows_here)
        *reinterpret_cast<uint4*>(y + own + (from + i * kRowStep) * d) =
            *reinterpret_cast<const uint4*>(rows + place(i));
  }
}

// The rest runs on the host: sizes of launches.

constexpr size_t kStridedShared = sizeof(uint16_t) * kStrips * kStripRows * kStripRow;
constexpr int64_t kStridedBlocks = 128;  // of threads, about one for each multiprocessor

// True if the kernel takes a stage; `pointers` are the addresses of x and y combined by bitwise or.
template <class T>
bool takes_strided(const Stage& stage, int64_t rows, int64_t d, uintptr_t pointers) {
  return is_half<T> && stage.size == kApart && stage.chunk == 4 && stage.stride > 1 &&
         stage.stride % kTogether == 0 && rows < INT32_MAX - kStrips * kStripRows &&
         d < 1 << 24 && pointers % 16 == 0;
}

// Rows of a block of threads: no less than have as many bytes as the matrices that it loads.
inline int64_t strided_rows(int64_t rows, int64_t d) {
  constexpr int64_t kLeast = sizeof(float) * kApart / sizeof(uint16_t);
  const int64_t blocks = std::max<int64_t>(1, kStridedBlocks / (d / kStripRow));
  return divide_up(std::max(divide_up(rows, blocks), kLeast), kStripRows) * kStripRows;
}

}  // namespace boft::cuda
