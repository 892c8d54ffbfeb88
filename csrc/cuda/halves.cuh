// Rows of halves times a stage with groups of at most 64 features, and both gradients. Rows go from
// global memory into registers and back, with no exchange between lanes.
//
// A *piece* is a set of Width = 32 or 64 columns that the stage mixes only with each other: the
// features of a few neighboring groups, in vectors of 8 (16 bytes). With g = lane / 4 and
// t = lane % 4, lane (g, t) reads vectors t and t + 4 of rows g and g + 8. mma() wants other
// columns in that lane, but a sum does not depend on how its terms are numbered: word w of a lane's
// vectors is declared to be inner pair t of one matrix instruction and column pair t of another.
// Registers are operands as they were read, and results lie where they are written. Only the
// stage's matrix has to be arranged in that order, once for a block of threads; it stays in
// registers. (The gradient of the stage sums over rows, which therefore go through shared memory.)
#pragma once

#include "gram.cuh"

namespace boft::cuda {

constexpr int kThreads = 128;  // threads of a block of threads
constexpr int kLine = 64;      // its columns: a line of 128 bytes if they are neighbors
constexpr int kGramRows = 64;  // rows that it has in shared memory at a time

// Blocks of threads that a multiprocessor should have room for. From compute capability 10.0 on,
// the same kernel takes more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <int Width>
constexpr int kResident = Width == 32 ? 3 : 2;
#else
template <int Width>
constexpr int kResident = Width == 32 ? 5 : 3;
#endif

// Number of warps that share a piece, each with rows of its own.
template <int Width>
constexpr int kTeam = Width / 16;

// Division of a row of d features into pieces.
struct Pieces {
  int size, chunk, stride;  // as in boft::Stage, but with stride 1 a group is one chunk
  int groups;               // groups in a piece
  int run;                  // features of a piece that are neighbors: groups * chunk
  int period;               // neighboring groups whose features interleave; all, with stride 1
  int across, count;        // pieces in a period, and in a row
  int all;                  // groups in a row
  unsigned reciprocal;      // inverse of size: n / size = n * reciprocal >> 18 for n < 4096
};

// Division into pieces of at most `width` columns; its count is 0 if the stage does not fit,
// because a group is larger or its chunks do not make up whole vectors.
inline Pieces pieces_of(const boft::Stage& stage, int64_t d, int width) {
  Pieces p{};
  p.size = int(stage.size), p.stride = int(stage.stride);
  p.chunk = p.stride == 1 ? p.size : int(stage.chunk);
  p.period = p.stride == 1 ? int(d / p.size) : p.stride;
  int whole = 1;  // groups whose chunks make whole vectors
  while (whole * p.chunk % 8 != 0) whole *= 2;
  p.groups = std::min(width / p.size, p.period) / whole * whole;
  if (p.groups == 0 || p.period % whole != 0) return p;
  p.run = p.groups * p.chunk;
  p.across = (p.period + p.groups - 1) / p.groups;
  p.all = int(d / p.size);
  p.count = p.all / p.period * p.across;
  p.reciprocal = ((1u << 18) + unsigned(p.size) - 1) / unsigned(p.size);
  return p;
}

// Position of a piece in a row, and of this lane's vectors in it.
template <int Width>
struct PieceOrigin {
  int group, groups;              // first group, and number of groups that exist
  bool exists[Width / 32];        // true if the lane's vector exists
  unsigned features[Width / 32];  // first feature of the vector
};

// Position of piece number `piece` of a row; it has no groups if there is no such piece.
template <int Width>
__device__ __forceinline__ PieceOrigin<Width> origin_of(const Pieces& p, int piece) {
  PieceOrigin<Width> w{};
  const int first = piece % p.across * p.groups, rest = p.period - first;
  const int before = piece / p.across * p.period;
  w.groups = piece >= p.count ? 0 : rest < p.groups ? rest : p.groups;
  w.group = before + first;
#pragma unroll
  for (int i = 0; i < Width / 32; ++i) {
    const int at = (int(threadIdx.x) % 4 + 4 * i) * 8, chunk = at / p.run, along = at % p.run;
    w.exists[i] = chunk < p.size / p.chunk && along < w.groups * p.chunk;
    w.features[i] =
        unsigned(before * p.size + first * p.chunk + chunk * p.stride * p.chunk + along);
  }
  return w;
}

// Position in a piece of feature r % size of group r / size.
__device__ __forceinline__ int position_of(const Pieces& p, int r) {
  const int group = r / p.size, i = r % p.size;
  return i / p.chunk * p.run + group * p.chunk + i % p.chunk;
}

// Feature at a position of a piece: kLine * group + feature in the group, or -1 if there is none.
__device__ __forceinline__ int element_at(const Pieces& p, int position, int groups) {
  const int chunk = position / p.run, along = position % p.run, group = along / p.chunk;
  const bool exists = chunk < p.size / p.chunk && group < groups;
  return exists ? kLine * group + chunk * p.chunk + along % p.chunk : -1;
}

// Number of registers of a lane for the right operands of all products of a piece. Words
// 2 (s * Width / 8 + q) and the next one are b0 and b1 of mma() for inner step s and column tile q.
template <int Width>
constexpr int kWords = Width / 16 * (Width / 8) * 2;
// Words of a lane in shared memory, with padding: vectors of 4 words stay aligned, and those of 8
// lanes lie in different banks.
template <int Width>
constexpr int kWordPitch = kWords<Width> + 4;
// Words of shared memory to arrange the matrix of one piece: offsets of its rows and columns, then
// the words of 32 lanes.
template <int Width>
constexpr int kArrange = Width + 32 * kWordPitch<Width>;

// Arranges the stage's matrices for a piece as the `words` of each lane. The identity is
// subtracted, and y = x + x (R - I) is computed, since R itself rounded to 8 or 11 bits would lose
// a small rotation. An entry's offset in shared memory is a sum of one number for its row and one
// for its column, which are computed first. All warps of a block of threads have to call, because
// of the barriers.
//   matrices: (d / size, size, size);  group, groups: those of the piece
//   shared:   kArrange<Width> words for each piece of the block of threads
template <class T, int Width>
__device__ __forceinline__ void arrange(uint32_t (&words)[kWords<Width>], uint32_t* shared,
                                        const float* matrices, const Pieces& p, int group,
                                        int groups, bool transpose) {
  constexpr int kMembers = 32 * kTeam<Width>, kAtOnce = Width / 8;
  const int thread = int(threadIdx.x) % kMembers, lane = int(threadIdx.x) % 32;
  uint32_t* own = shared + int(threadIdx.x) / kMembers * kArrange<Width>;
  uint16_t* parts = reinterpret_cast<uint16_t*>(own);  // offsets of row i and column i, in turn
  uint32_t* to = own + Width;
  for (int i = thread; i < 32 * kWordPitch<Width>; i += kMembers) to[i] = 0;
  if (thread < groups * p.size) {
    const int at = position_of(p, thread), t = at % 32 / 8, w = at / 32 * 4 + at % 8 / 2;
    parts[2 * thread] =
        uint16_t(2 * (t * kWordPitch<Width> + w / 2 * (Width / 4) + w % 2) + at % 2);
    parts[2 * thread + 1] = uint16_t(2 * ((2 * t + at % 2) * 4 * kWordPitch<Width> + 2 * w));
  }
  __syncthreads();
  const float* from = matrices + int64_t(group) * p.size * p.size;
  const int count = groups * p.size * p.size;
  const auto divide = [&](int n) { return int(unsigned(n) * p.reciprocal >> 18); };
  for (int first = thread; first < count; first += kAtOnce * kMembers) {
    float values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      values[i] = first + i * kMembers < count ? from[first + i * kMembers] : 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int index = first + i * kMembers;
      if (index >= count) break;
      const int row = divide(index), column = divide(row) * p.size + index - row * p.size;
      const int inner = transpose ? column : row, outer = transpose ? row : column;
      reinterpret_cast<T*>(to)[parts[2 * inner] + parts[2 * outer + 1]] =
          narrow<T>(row == column ? values[i] - 1 : values[i]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWords<Width>; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(to + lane * kWordPitch<Width> + i);
    words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
  }
}

// A lane's part of 16 rows of a piece: at[0] are its vectors of row g, at[1] those of row g + 8.
template <int Width>
struct Rows {
  uint32_t at[2][Width / 8];
};

// Sets a vector of row g (high = 0) or g + 8 (high = 1); get() returns it.
template <int Width>
__device__ __forceinline__ void put(Rows<Width>& rows, int high, int vector, uint4 v) {
  uint32_t* to = rows.at[high] + 4 * vector;
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
template <int Width>
__device__ __forceinline__ uint4 get(const Rows<Width>& rows, int high, int vector) {
  const uint32_t* from = rows.at[high] + 4 * vector;
  return {from[0], from[1], from[2], from[3]};
}

// Computes rows (I + M), where `words` is the arranged matrix M, with row g times factors[0] and
// row g + 8 times factors[1] if Factor.
template <class T, int Width, bool Factor = false>
__device__ __forceinline__ Rows<Width> rotated(const Rows<Width>& rows,
                                               const uint32_t (&words)[kWords<Width>],
                                               const float* factors = nullptr) {
  Rows<Width> out;
#pragma unroll
  for (int first = 0; first < Width / 8; first += 4) {  // 4 tiles: no registers for more sums
    float sums[4][4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      unpack<T>(rows.at[0][first + q], sums[q][0], sums[q][1]);
      unpack<T>(rows.at[1][first + q], sums[q][2], sums[q][3]);
    }
#pragma unroll
    for (int s = 0; s < Width / 16; ++s) {
      const uint32_t a[4] = {rows.at[0][2 * s], rows.at[1][2 * s], rows.at[0][2 * s + 1],
                             rows.at[1][2 * s + 1]};
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const uint32_t* b = words + 2 * (s * (Width / 8) + first + q);
        mma<T>(sums[q], a, b[0], b[1]);
      }
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if constexpr (Factor)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[q][i] *= factors[i / 2];
      out.at[0][first + q] = pack<T>(sums[q][0], sums[q][1]);
      out.at[1][first + q] = pack<T>(sums[q][2], sums[q][3]);
    }
  }
  return out;
}

// Computes y = x S, or x S^T if `transpose`. Warps do not wait for each other after the matrix is
// arranged; each has 4 KB of loads under way at a time.
//   x, y: (n_rows, d);  matrices: (d / size, size, size)
//   factor: (n_rows,), of each row of y; unused unless Factor
template <class T, int Width, bool Factor>
__global__ void __launch_bounds__(kThreads, kResident<Width>)
    rotate_halves_kernel(const T* x, const float* matrices, const float* factor, T* y, Pieces p,
                         int n_rows, int64_t d, int rows_per_block, bool transpose) {
  constexpr int kAcross = kLine / Width, kTiles = 128 / Width, kEach = Width / 32;
  const int warp = int(threadIdx.x) / 32, g = int(threadIdx.x) % 32 / 4;
  const int tiles = (p.count + kAcross - 1) / kAcross;
  const int64_t first = int64_t(int(blockIdx.x) / tiles) * rows_per_block;
  const int rows_here = int(n_rows - first < rows_per_block ? n_rows - first : rows_per_block);
  const auto origin =
      origin_of<Width>(p, int(blockIdx.x) % tiles * kAcross + warp / kTeam<Width>);
  const int skip = warp % kTeam<Width> * (16 * kTiles), step = kTeam<Width> * (16 * kTiles);
  int left = rows_here - skip - g;  // rows left, counted from this lane's first one
  unsigned at[kEach];  // offsets of this lane's vectors from the block's first row
#pragma unroll
  for (int v = 0; v < kEach; ++v) at[v] = (skip + g) * unsigned(d) + origin.features[v];
  int64_t start = first * d;
  Rows<Width> rows[kTiles];
  const auto load = [&] {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i)
#pragma unroll
      for (int v = 0; v < kEach; ++v) {
        uint4 vector{};
        if (origin.exists[v] && 8 * i < left)
          vector = *reinterpret_cast<const uint4*>(x + start + 8 * i * d + at[v]);
        put(rows[i / 2], i % 2, v, vector);
      }
  };
  load();  // while the stage is arranged
  uint32_t words[kWords<Width>];
  arrange<T, Width>(words, reinterpret_cast<uint32_t*>(shared_memory()), matrices, p, origin.group,
                    origin.groups, transpose);
  while (left + g > 0) {  // true for all lanes of a warp or for none
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      if constexpr (Factor) {
        if (i % 2 == 0) {
          const int64_t row = first + rows_here - left + 8 * i;
          const float factors[2] = {8 * i < left ? factor[row] : 1.0f,
                                    8 * i + 8 < left ? factor[row + 8] : 1.0f};
          rows[i / 2] = rotated<T, Width, true>(rows[i / 2], words, factors);
        }
      } else if (i % 2 == 0) {
        rows[i / 2] = rotated<T, Width>(rows[i / 2], words);
      }
#pragma unroll
      for (int v = 0; v < kEach; ++v)
        if (origin.exists[v] && 8 * i < left)
          *reinterpret_cast<uint4*>(y + start + 8 * i * d + at[v]) = get(rows[i / 2], i % 2, v);
    }
    start += step * d;
    left -= step;
    load();
  }
}

// Computes the same as gram_kernel: x^T grad of every group over one split of the rows, and with
// XGrad also x_grad. A warp has 16 positions of x and all positions of grad in the same piece. Rows
// are in two buffers, one of which is filled while the other is multiplied, so that 64 rows take
// one barrier.
template <class T, int Width, bool XGrad>
__global__ void __launch_bounds__(kThreads, kResident<Width>)
    gram_halves_kernel(const T* x, const T* grad, const float* matrices, T* x_grad, float* partials,
                       Pieces p, int n_rows, int64_t d, int rows_per_block, bool transpose) {
  constexpr int kAcross = kLine / Width, kEach = Width / 32;
  constexpr int kTiles = kGramRows / 16 / kTeam<Width>;  // tiles of 16 rows of a warp
  constexpr int kPitch = kLine + kPad<T>, kBuffer = kGramRows * kPitch;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int team = warp / kTeam<Width>, member = warp % kTeam<Width>;
  const int tiles = (p.count + kAcross - 1) / kAcross;
  const int64_t first = int64_t(int(blockIdx.x) / tiles) * rows_per_block;
  const int rows_here = int(n_rows - first < rows_per_block ? n_rows - first : rows_per_block);
  const auto origin = origin_of<Width>(p, int(blockIdx.x) % tiles * kAcross + team);
  T* buffers = reinterpret_cast<T*>(shared_memory());  // two, of x and of grad each
  const int own_row = member * 16 * kTiles + g;
  const int own = own_row * kPitch + team * Width + 8 * t;
  unsigned at[kEach];  // as in rotate_halves_kernel
#pragma unroll
  for (int v = 0; v < kEach; ++v) at[v] = own_row * unsigned(d) + origin.features[v];
  int64_t start = first * d;
  // Starts to load the rows `ahead` of `start` to the buffer of `turn`; `left` of them exist,
  // counted from this lane's first one.
  const auto load = [&](int ahead, int left, int turn) {
    T* to = buffers + turn % 2 * 2 * kBuffer + own;
#pragma unroll
    for (int v = 0; v < kEach; ++v) {
      if (!origin.exists[v]) continue;
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int64_t from = start + (ahead + 8 * i) * d + at[v];
        T *of_x = to + 8 * i * kPitch + 32 * v, *of_grad = of_x + kBuffer;
        if (8 * i < left) {
          copy_async<16>(of_x, x + from);
          copy_async<16>(of_grad, grad + from);
        } else {
          *reinterpret_cast<uint4*>(of_x) = uint4{};
          *reinterpret_cast<uint4*>(of_grad) = uint4{};
        }
      }
    }
    close_copies();
  };
  int left = rows_here - own_row;
  load(0, left, 0);
  uint32_t* const shared = reinterpret_cast<uint32_t*>(buffers + 4 * kBuffer);
  uint32_t words[kWords<Width>];
  if constexpr (XGrad)
    arrange<T, Width>(words, shared, matrices, p, origin.group, origin.groups, !transpose);
  // For the end, kept in shared memory: element_at() of each position of the piece, and its first
  // group.
  int* const elements =
      reinterpret_cast<int*>(shared) + XGrad * kAcross * kArrange<Width> + team * (Width + 1);
  const int thread = int(threadIdx.x) % (32 * kTeam<Width>);
  if (thread < Width) elements[thread] = element_at(p, thread, origin.groups);
  if (thread == 0) elements[Width] = origin.group;
  __syncthreads();
  float sums[Width / 8][4] = {};
  for (int turn = 0; left + own_row > 0; ++turn, left -= kGramRows) {
    await_copies<0>();
    __syncthreads();  // and every warp has read the other buffer
    if (left + own_row > kGramRows) load(kGramRows, left - kGramRows, turn + 1);
    const T *of_x = buffers + turn % 2 * 2 * kBuffer, *of_grad = of_x + kBuffer;
    multiply_transposed<T, Width>(sums, of_x + team * Width + member * 16, of_grad + team * Width,
                                  kPitch, kGramRows);
    if constexpr (XGrad) {
      const T* from = of_grad + own;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        Rows<Width> rows;
#pragma unroll
        for (int high = 0; high < 2; ++high)
#pragma unroll
          for (int v = 0; v < kEach; ++v)
            put(rows, high, v,
                origin.exists[v] ? *reinterpret_cast<const uint4*>(
                                    from + (16 * i + 8 * high) * kPitch + 32 * v)
                              : uint4{});
        rows = rotated<T, Width>(rows, words);
#pragma unroll
        for (int high = 0; high < 2; ++high)
#pragma unroll
          for (int v = 0; v < kEach; ++v) {
            const int row = 16 * i + 8 * high;
            if (origin.exists[v] && row < left)
              *reinterpret_cast<uint4*>(x_grad + start + row * d + at[v]) = get(rows, high, v);
          }
      }
    }
    start += kGramRows * d;
  }
  partials += (int64_t(int(blockIdx.x) / tiles) * p.all + elements[Width]) * p.size * p.size;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int inner = elements[member * 16 + g + 8 * i];
    if (inner < 0) continue;
    const int group = inner / kLine, from = inner % kLine;
    float* const to = partials + group * p.size * p.size + from * (transpose ? 1 : p.size);
#pragma unroll
    for (int n = 0; n < Width / 8; ++n)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int outer = elements[8 * n + 2 * t + k];
        if (outer / kLine == group && outer >= 0)
          to[outer % kLine * (transpose ? p.size : 1)] = sums[n][2 * i + k];
      }
  }
}

}  // namespace boft::cuda
