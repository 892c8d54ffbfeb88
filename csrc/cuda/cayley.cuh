// Cayley transform R = (I + Q)(I - Q)^-1 = 2 (I - Q)^-1 - I of many small blocks, and its gradient.
// The inverse is computed in float64, as in the reference: the error of a float32 elimination would
// grow with |Q|.
//
// Blocks of b = 2, 4, 8 fit the registers of one thread, which inverts one on its own
// (cayley_small_*). The 32 blocks of a warp are neighbors in global memory and are copied through
// shared memory.
//
// Any other block is inverted by a team of B threads, B being b rounded up to a power of two; the
// padding is the identity and never mixes with the rest. Thread j of a team holds column j in
// registers, and publishes it in shared memory when the others need it. A broadcast read from there
// brings two doubles, where a shuffle takes two instructions for each.
#pragma once

#include "ptx.cuh"

namespace boft::cuda {

// Sizes of teams. A block of another size goes to the next larger one.
#define BOFT_SMALL_TEAMS(X) X(2) X(4) X(8) X(16) X(32)
#define BOFT_TEAMS(X) BOFT_SMALL_TEAMS(X) X(64)

// Threads of a block of threads, and teams in it.
template <int B>
constexpr int kCayleyThreads = B <= 16 ? 128 : 64;

template <int B>
constexpr int kTeams = kCayleyThreads<B> / B;

template <int B>
struct CayleyShared {
  static_assert(B >= 2 && B <= kMaxBlock && (B & (B - 1)) == 0, "a power of two");
  // Two buffers, so that one can be written while the other is read; padded, so that teams use
  // different banks.
  double column[2][kTeams<B>][B + 2];
};

template <int B, class W>
struct CayleyBackwardShared {
  struct Team {
    alignas(16) W left[B][B];  // I + R
    W middle[B][B + 1];        // (I + R)^T G, then 2 U
  };
  Team teams[kTeams<B>];
};

// Waits for all threads of a team.
template <int B>
__device__ __forceinline__ void sync_team() {
  if constexpr (B <= 32) __syncwarp();
  else __syncthreads();  // the block of threads is one team
}

// Offset of entry (i, j), i < j, in the packed strict upper triangle, row-major.
__device__ __forceinline__ int packed(int i, int j, int b) {
  return i * (2 * b - i - 1) / 2 + j - i - 1;
}

// Computes R of one block with a team, by Gauss-Jordan elimination of I - Q in place. No pivoting
// is needed: the symmetric part of I - Q is I, so no pivot is below 1. In step k, thread k
// publishes column k, and every thread subtracts it, times its own entry of the pivot row, from its
// own column.
//   lane:    number of the thread in its team, and of its column
//   skew:    b(b-1)/2 numbers;  out: (b, b)
//   dropped: the block is to be the identity
//   active:  the team has a block; a team without one still has to call, because of the barriers
template <int B, class T>
__device__ void cayley_block(CayleyShared<B>& shared, int team, int lane, const T* skew,
                             bool dropped, T* out, int b, bool active) {
  double a[B];  // one column of I - Q; in step k its row k is a[0]
#pragma unroll
  for (int i = 0; i < B; ++i) {
    const bool inside = active && !dropped && i < b && lane < b && i != lane;
    const int at = i < lane ? packed(i, lane, b) : packed(lane, i, b);
    const double upper = inside ? double(widen(skew[at])) : 0.0;
    a[i] = i == lane ? 1.0 : i < lane ? -upper : upper;
  }
#pragma unroll 1  // rows move up by one in each step, as registers can be indexed by constants only
  for (int k = 0; k < b; ++k) {
    double* column = shared.column[k % 2][team];
    if (lane == k) {
#pragma unroll
      for (int i = 0; i < B; ++i) column[i] = a[i];
    }
    sync_team<B>();
    const double inverse = reciprocal(column[0]);
    const double row = lane == k ? inverse : a[0] * inverse;
#pragma unroll
    for (int i = 1; i < B; ++i) a[i - 1] = (lane == k ? 0.0 : a[i]) - column[i] * row;
    a[B - 1] = row;
  }
  if (!active || lane >= b) return;
#pragma unroll
  for (int i = 0; i < B; ++i) {
    const int row = i + b < B ? i + b : i + b - B;
    if (row < b) out[row * b + lane] = narrow<T>(2.0 * a[i] - (row == lane ? 1.0 : 0.0));
  }
}

// Computes the gradient of the packed entries of one block with a team: skew_grad_ij = U_ij - U_ji
// with U = 1/2 (I + R)^T G (I + R)^T. Thread `lane` computes column `lane` of (I + R)^T G, then row
// `lane` of 2 U.
//   block: R, (b, b);  grad: G, (b, b);  skew_grad: b(b-1)/2 numbers; the rest as in cayley_block
template <int B, class T, class G>
__device__ void cayley_backward_block(typename CayleyBackwardShared<B, Wide<T>>::Team& team,
                                      int lane, const T* block, bool dropped, const G* grad,
                                      T* skew_grad, int b, bool active) {
  using W = Wide<T>;
  const bool inside = active && lane < b;
#pragma unroll 8
  for (int i = 0; i < B; ++i) {
    const W r = inside && i < b ? widen(block[i * b + lane]) : W(0);
    team.left[i][lane] = i == lane ? r + W(1) : r;
  }
  sync_team<B>();
  W sums[B] = {};  // column `lane` of (I + R)^T G
#pragma unroll 4
  for (int k = 0; k < b; ++k) {
    const W g = inside ? W(widen(grad[k * b + lane])) : W(0);
#pragma unroll
    for (int i = 0; i < B; ++i) sums[i] += team.left[k][i] * g;
  }
#pragma unroll
  for (int i = 0; i < B; ++i) team.middle[i][lane] = sums[i];
  sync_team<B>();
#pragma unroll
  for (int k = 0; k < B; ++k) sums[k] = team.middle[lane][k];  // row `lane` of it
#pragma unroll 2
  for (int i = 0; i < b; ++i) {
    W u = 0;
#pragma unroll
    for (int k = 0; k < B; ++k) u += sums[k] * team.left[i][k];
    team.middle[lane][i] = u;  // no other thread reads this row before the barrier
  }
  sync_team<B>();
  if (!inside) return;
  for (int i = 0; i < lane; ++i) {
    const W value = W(0.5) * (team.middle[i][lane] - team.middle[lane][i]);
    skew_grad[packed(i, lane, b)] = narrow<T>(dropped ? W(0) : value);
  }
}

// Computes blocks (n_blocks, b, b) from skew (n_blocks, b(b-1)/2), b <= B, a team for each block.
template <class T, int B>
__global__ void __launch_bounds__(kCayleyThreads<B>)
    cayley_kernel(const T* skew, const bool* drop, T* blocks, int64_t n_blocks, int b) {
  auto& shared = *reinterpret_cast<CayleyShared<B>*>(shared_memory());
  const int team = int(threadIdx.x) / B, lane = int(threadIdx.x) % B;
  const int64_t block = int64_t(blockIdx.x) * kTeams<B> + team;
  const bool active = block < n_blocks;
  const bool dropped = active && drop != nullptr && drop[block];
  cayley_block<B>(shared, team, lane, skew + block * (b * (b - 1) / 2), dropped,
                  blocks + block * (b * b), b, active);
}

// Computes skew_grad (n_blocks, b(b-1)/2) from blocks and grad (n_blocks, b, b), a team for each
// block.
template <class T, int B>
__global__ void __launch_bounds__(kCayleyThreads<B>)
    cayley_backward_kernel(const T* blocks, const bool* drop, const T* grad, T* skew_grad,
                           int64_t n_blocks, int b) {
  auto& shared = *reinterpret_cast<CayleyBackwardShared<B, Wide<T>>*>(shared_memory());
  const int team = int(threadIdx.x) / B, lane = int(threadIdx.x) % B;
  const int64_t block = int64_t(blockIdx.x) * kTeams<B> + team;
  const bool active = block < n_blocks;
  const bool dropped = active && drop != nullptr && drop[block];
  cayley_backward_block<B>(shared.teams[team], lane, blocks + block * (b * b), dropped,
                           grad + block * (b * b), skew_grad + block * (b * (b - 1) / 2), b,
                           active);
}

// Shared memory for the 32 butterfly blocks of a warp, N numbers each. A warp copies all of them
// from and to global memory in vectors; thread i of it reads and writes block i. The order is that
// of global memory, except that the *grains* of a block, pieces of at most 16 bytes, may be
// permuted, so that those of neighboring blocks lie in different banks.
template <class T, int N>
struct Tile {
  static constexpr int kBytes = N * int(sizeof(T));
  static constexpr int kGrainBytes =
      kBytes % 16 == 0 ? 16 : kBytes % 8 == 0 ? 8 : kBytes % 4 == 0 ? 4 : 2;
  static constexpr int kGrains = kBytes / kGrainBytes;
  static constexpr int kInGrain = kGrainBytes / int(sizeof(T));
  struct alignas(kGrainBytes) Grain {
    T at[kInGrain];
  };
  alignas(16) Grain grains[32 * kGrains];

  // Position of grain `index` of all. Grains are permuted if a block has a power of two of them. An
  // odd number of grains needs no permutation, and of grains of less than 16 bytes a block has an
  // odd number. The permutation is linear in the bits of the index: the position of the sum of
  // two indices without common bits is computed from theirs (joined()), at compile time except for
  // that of the lane.
  static constexpr bool kExchanged = (kGrains & (kGrains - 1)) == 0;
  __device__ __forceinline__ static constexpr int slot(int index) {
    return kExchanged ? index ^ (index / (kGrains < 8 ? 8 : kGrains) % kGrains) : index;
  }
  // Position of the sum of two indices without common bits, from their positions.
  __device__ __forceinline__ static constexpr int joined(int a, int b) {
    return kExchanged ? a ^ b : a + b;
  }
  // Number `index` of all 32 * N.
  __device__ __forceinline__ T& element(int index) {
    const int grain = index / N * kGrains + index % N / kInGrain;
    return grains[slot(grain)].at[index % N % kInGrain];
  }
  // Address of the i-th 16 bytes that a lane copies.
  __device__ __forceinline__ uint4* vector(int lane, int i) {
    return reinterpret_cast<uint4*>(grains) + joined(slot(lane), slot(32 * i));
  }

  // Starts to load `blocks` <= 32 blocks, for a warp. `vectors`: the global address is a multiple
  // of 16 bytes. await_copies() and a barrier have to follow.
  __device__ __forceinline__ void load(const T* from, int blocks, bool vectors) {
    const int lane = int(threadIdx.x) % 32;
    if (vectors && blocks == 32) {
#pragma unroll
      for (int i = 0; i < (2 * kBytes + 31) / 32; ++i)
        if (const int at = 32 * i + lane; at < 2 * kBytes)
          copy_async<16>(vector(lane, i), reinterpret_cast<const uint4*>(from) + at);
    } else {
      for (int at = lane; at < blocks * N; at += 32) element(at) = from[at];
    }
    close_copies();
  }
  // Stores `blocks` blocks, for a warp.
  __device__ __forceinline__ void store(T* to, int blocks, bool vectors) {
    const int lane = int(threadIdx.x) % 32;
    if (vectors && blocks == 32) {
#pragma unroll
      for (int i = 0; i < (2 * kBytes + 31) / 32; ++i)
        if (const int at = 32 * i + lane; at < 2 * kBytes)
          reinterpret_cast<uint4*>(to)[at] = *vector(lane, i);
    } else {
      for (int at = lane; at < blocks * N; at += 32) to[at] = element(at);
    }
  }

  // Calls f(index, number) for the N numbers of one block.
  template <class F>
  __device__ __forceinline__ void read(int block, F f) const {
#pragma unroll
    for (int grain = 0; grain < kGrains; ++grain) {
      const Grain values = grains[joined(slot(block * kGrains), grain)];
#pragma unroll
      for (int i = 0; i < kInGrain; ++i) f(grain * kInGrain + i, values.at[i]);
    }
  }
  // Writes f(index) to the N numbers of one block.
  template <class F>
  __device__ __forceinline__ void write(int block, F f) {
#pragma unroll
    for (int grain = 0; grain < kGrains; ++grain) {
      Grain values;
#pragma unroll
      for (int i = 0; i < kInGrain; ++i) values.at[i] = f(grain * kInGrain + i);
      grains[joined(slot(block * kGrains), grain)] = values;
    }
  }
};

// Numbers of a packed triangle.
template <int B>
constexpr int kPacked = B * (B - 1) / 2;
constexpr int kSmallThreads = 64;

// Inverts a matrix in place in the registers of one thread, with the same operations as
// cayley_block.
template <int B>
__device__ __forceinline__ void invert(double (&a)[B][B]) {
#pragma unroll
  for (int k = 0; k < B; ++k) {
    const double inverse = reciprocal(a[k][k]);
#pragma unroll
    for (int j = 0; j < B; ++j) a[k][j] = j == k ? inverse : a[k][j] * inverse;
#pragma unroll
    for (int i = 0; i < B; ++i) {
      if (i == k) continue;
      const double factor = a[i][k];
#pragma unroll
      for (int j = 0; j < B; ++j) a[i][j] = (j == k ? 0.0 : a[i][j]) - factor * a[k][j];
    }
  }
}

template <class T, int B>
union CayleySmallShared {
  Tile<T, kPacked<B>> skew;
  Tile<T, B * B> blocks;
};

template <class T, int B>
union CayleySmallBackwardShared {
  struct {
    Tile<T, B * B> blocks, grad;
  } in;
  Tile<T, kPacked<B>> skew;
};

// Computes blocks (n_blocks, B, B) from skew (n_blocks, B(B-1)/2), one thread for each block;
// `vectors` as in Tile. The registers of a multiprocessor are enough for six blocks of threads.
template <class T, int B>
__global__ void __launch_bounds__(kSmallThreads, 6)
    cayley_small_kernel(const T* skew, const bool* drop, T* blocks, int64_t n_blocks,
                        bool vectors) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t first = int64_t(blockIdx.x) * kSmallThreads + warp * 32;
  const int count = n_blocks - first < 32 ? int(n_blocks - first) : 32;
  if (count <= 0) return;
  auto& shared = reinterpret_cast<CayleySmallShared<T, B>*>(shared_memory())[warp];
  shared.skew.load(skew + first * kPacked<B>, count, vectors);
  const bool dropped = drop != nullptr && lane < count && drop[first + lane];
  await_copies<0>();
  __syncwarp();
  T values[kPacked<B>] = {};
  shared.skew.read(lane, [&](int index, T value) { values[index] = value; });
  double a[B][B];  // (I - Q) / 2, whose inverse is R + I
#pragma unroll
  for (int i = 0; i < B; ++i) {
    a[i][i] = 0.5;
#pragma unroll
    for (int j = i + 1; j < B; ++j) {
      a[j][i] = dropped ? 0.0 : double(Wide<T>(0.5) * widen(values[packed(i, j, B)]));
      a[i][j] = -a[j][i];
    }
  }
  __syncwarp();  // every lane has read its parameters
  invert(a);
  shared.blocks.write(lane, [&](int index) {
    const int i = index / B, j = index % B;
    return narrow<T>(i == j ? a[i][j] - 1.0 : a[i][j]);
  });
  __syncwarp();
  shared.blocks.store(blocks + first * B * B, count, vectors);
}

// Computes skew_grad (n_blocks, B(B-1)/2) from blocks and grad (n_blocks, B, B), one thread for
// each block. It takes types that are computed in float32: two matrices in float64 would not fit
// the registers. Halves need more registers than six blocks of threads could have.
template <class T, int B>
__global__ void __launch_bounds__(kSmallThreads, is_half<T> ? 4 : 6)
    cayley_small_backward_kernel(const T* blocks, const bool* drop, const T* grad, T* skew_grad,
                                 int64_t n_blocks, bool vectors) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t first = int64_t(blockIdx.x) * kSmallThreads + warp * 32;
  const int count = n_blocks - first < 32 ? int(n_blocks - first) : 32;
  if (count <= 0) return;
  auto& shared = reinterpret_cast<CayleySmallBackwardShared<T, B>*>(shared_memory())[warp];
  shared.in.blocks.load(blocks + first * B * B, count, vectors);
  shared.in.grad.load(grad + first * B * B, count, vectors);
  const bool dropped = drop != nullptr && lane < count && drop[first + lane];
  await_copies<0>();
  __syncwarp();
  float left[B][B], middle[B][B] = {};  // I + R, (I + R)^T G
  shared.in.blocks.read(lane, [&](int index, T value) {
    const int i = index / B, j = index % B;
    left[i][j] = i == j ? widen(value) + 1.0f : widen(value);
  });
  shared.in.grad.read(lane, [&](int index, T value) {
    const float g = widen(value);
#pragma unroll
    for (int i = 0; i < B; ++i) middle[i][index % B] += left[index / B][i] * g;
  });
  T values[kPacked<B>] = {};
#pragma unroll
  for (int i = 0; i < B; ++i)
#pragma unroll
    for (int j = i + 1; j < B; ++j) {
      float upper = 0, lower = 0;  // entries (i, j) and (j, i) of 2 U
#pragma unroll
      for (int k = 0; k < B; ++k) {
        upper += middle[i][k] * left[j][k];
        lower += middle[j][k] * left[i][k];
      }
      values[packed(i, j, B)] = narrow<T>(dropped ? 0.0f : 0.5f * (upper - lower));
    }
  __syncwarp();  // every lane has read its matrices
  shared.skew.write(lane, [&](int index) { return values[index]; });
  __syncwarp();
  shared.skew.store(skew_grad + first * kPacked<B>, count, vectors);
}

}  // namespace boft::cuda
