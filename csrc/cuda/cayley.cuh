// The Cayley transform, in float64, like the reference: a float32 elimination would be off by |Q| times
// as much.
//
// Blocks of 2, 4 and 8 fit the registers of one thread, which needs nobody else to invert one; the 32
// blocks of a warp come and go through shared memory, as they are neighbours in global memory. Any other
// block is a team's of B threads, B the next power of two of the block size b; the padding is the
// identity and never mixes with the rest. Thread j of a team has column j. What a column has for the
// others goes through shared memory: a broadcast read brings two doubles, where a shuffle takes two
// instructions for each.
#pragma once

#include "ptx.cuh"

namespace boft::cuda {

// Sizes of teams; every other block size goes to the next of them.
#define BOFT_SMALL_TEAMS(X) X(2) X(4) X(8) X(16) X(32)
#define BOFT_TEAMS(X) BOFT_SMALL_TEAMS(X) X(64)

template <int B>
constexpr int kCayleyThreads = B <= 16 ? 128 : 64;

template <int B>
constexpr int kTeams = kCayleyThreads<B> / B;

template <int B>
struct CayleyShared {
  static_assert(B >= 2 && B <= kMaxBlock && (B & (B - 1)) == 0, "a power of two");
  // two, so that one can be written while the other is read; padded: teams are in different banks
  double column[2][kTeams<B>][B + 2];
};

template <int B, class W>
struct CayleyBackwardShared {
  struct Team {
    alignas(16) W left[B][B];  // I + R
    W middle[B][B + 1];        // (I + R)^T G, then U
  };
  Team teams[kTeams<B>];
};

template <int B>
__device__ __forceinline__ void sync_team() {
  if constexpr (B <= 32) __syncwarp();
  else __syncthreads();  // a block of threads is one team
}

// Offset of entry (i, j), i < j, in the packed strict upper triangle, row-major.
__device__ __forceinline__ int packed(int i, int j, int b) {
  return i * (2 * b - i - 1) / 2 + j - i - 1;
}

// R of one block, by Gauss-Jordan elimination in place, unpivoted: the symmetric part of I - Q is I,
// so that no pivot is below 1. All threads have to call it; those of a team without a block (`there`
// false) only keep the others company.
template <int B, class T>
__device__ void cayley_block(CayleyShared<B>& shared, int team, int lane, const T* skew,
                             bool dropped, T* out, int b, bool there) {
  double a[B];  // I - Q, one column of it; in step k, row k is at the top
#pragma unroll
  for (int i = 0; i < B; ++i) {
    const bool inside = there && !dropped && i < b && lane < b && i != lane;
    const int at = i < lane ? packed(i, lane, b) : packed(lane, i, b);
    const double upper = inside ? double(widen(skew[at])) : 0.0;
    a[i] = i == lane ? 1.0 : i < lane ? -upper : upper;
  }
#pragma unroll 1  // rows move up by one in each step: registers have no index that is not constant
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
  if (!there || lane >= b) return;
#pragma unroll
  for (int i = 0; i < B; ++i) {
    const int row = i + b < B ? i + b : i + b - B;
    if (row < b) out[row * b + lane] = narrow<T>(2.0 * a[i] - (row == lane ? 1.0 : 0.0));
  }
}

// Gradient of the packed entries of one block, from that of R; as above.
template <int B, class T, class G>
__device__ void cayley_backward_block(typename CayleyBackwardShared<B, Wide<T>>::Team& team,
                                      int lane, const T* block, bool dropped, const G* grad,
                                      T* skew_grad, int b, bool there) {
  using W = Wide<T>;
  const bool inside = there && lane < b;
#pragma unroll 8
  for (int i = 0; i < B; ++i) {
    const W r = inside && i < b ? widen(block[i * b + lane]) : W(0);
    team.left[i][lane] = i == lane ? r + W(1) : r;
  }
  sync_team<B>();
  W sums[B] = {};  // (I + R)^T G, column `lane`
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
  for (int k = 0; k < B; ++k) sums[k] = team.middle[lane][k];  // now row `lane`
#pragma unroll 2
  for (int i = 0; i < b; ++i) {
    W u = 0;
#pragma unroll
    for (int k = 0; k < B; ++k) u += sums[k] * team.left[i][k];
    team.middle[lane][i] = u;  // only this thread has read the row
  }
  sync_team<B>();
  if (!inside) return;
  for (int i = 0; i < lane; ++i) {
    const W value = W(0.5) * (team.middle[i][lane] - team.middle[lane][i]);
    skew_grad[packed(i, lane, b)] = narrow<T>(dropped ? W(0) : value);
  }
}

template <class T, int B>
__global__ void __launch_bounds__(kCayleyThreads<B>)
    cayley_kernel(const T* skew, const bool* drop, T* blocks, int64_t n_blocks, int b) {
  auto& shared = *reinterpret_cast<CayleyShared<B>*>(shared_memory());
  const int team = int(threadIdx.x) / B, lane = int(threadIdx.x) % B;
  const int64_t block = int64_t(blockIdx.x) * kTeams<B> + team;
  const bool there = block < n_blocks;
  const bool dropped = there && drop != nullptr && drop[block];
  cayley_block<B>(shared, team, lane, skew + block * (b * (b - 1) / 2), dropped,
                  blocks + block * (b * b), b, there);
}

template <class T, int B>
__global__ void __launch_bounds__(kCayleyThreads<B>)
    cayley_backward_kernel(const T* blocks, const bool* drop, const T* grad, T* skew_grad,
                           int64_t n_blocks, int b) {
  auto& shared = *reinterpret_cast<CayleyBackwardShared<B, Wide<T>>*>(shared_memory());
  const int team = int(threadIdx.x) / B, lane = int(threadIdx.x) % B;
  const int64_t block = int64_t(blockIdx.x) * kTeams<B> + team;
  const bool there = block < n_blocks;
  const bool dropped = there && drop != nullptr && drop[block];
  cayley_backward_block<B>(shared.teams[team], lane, blocks + block * (b * b), dropped,
                           grad + block * (b * b), skew_grad + block * (b * (b - 1) / 2), b, there);
}

// N numbers of each of the 32 blocks of a warp, in shared memory, to be read and written by one thread
// a block. Their order is that in global memory, but for the *grains* of a block, which may be
// exchanged so that those of neighbouring blocks lie in different banks.
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

  // Grain `index` of all lies here. Where blocks have a power of two of them; an odd number lies well as
  // it is, and if grains are of less than 16 bytes, there is an odd number or one. No bit of an index
  // changes what others do, so that places can be put together: at compile time, but for a lane's.
  static constexpr bool kExchanged = (kGrains & (kGrains - 1)) == 0;
  __device__ __forceinline__ static constexpr int place(int index) {
    return kExchanged ? index ^ (index / (kGrains < 8 ? 8 : kGrains) % kGrains) : index;
  }
  // The place of a sum, from those of summands without common bits.
  __device__ __forceinline__ static constexpr int both(int a, int b) {
    return kExchanged ? a ^ b : a + b;
  }
  __device__ __forceinline__ T& element(int index) {
    const int grain = index / N * kGrains + index % N / kInGrain;
    return grains[place(grain)].at[index % N % kInGrain];
  }
  // The `i`-th 16 bytes that a lane moves.
  __device__ __forceinline__ uint4* vector(int lane, int i) {
    return reinterpret_cast<uint4*>(grains) + both(place(lane), place(32 * i));
  }

  // A warp's part in both directions, of `blocks` blocks; `vectors`: global addresses are multiples of
  // 16 bytes. What is loaded has to be waited for, with await_copies and a barrier.
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

  // Calls f(index of a number, number) for those of one block.
  template <class F>
  __device__ __forceinline__ void read(int block, F f) const {
#pragma unroll
    for (int grain = 0; grain < kGrains; ++grain) {
      const Grain values = grains[both(place(block * kGrains), grain)];
#pragma unroll
      for (int i = 0; i < kInGrain; ++i) f(grain * kInGrain + i, values.at[i]);
    }
  }
  // And puts f(index) there.
  template <class F>
  __device__ __forceinline__ void write(int block, F f) {
#pragma unroll
    for (int grain = 0; grain < kGrains; ++grain) {
      Grain values;
#pragma unroll
      for (int i = 0; i < kInGrain; ++i) values.at[i] = f(grain * kInGrain + i);
      grains[both(place(block * kGrains), grain)] = values;
    }
  }
};

template <int B>
constexpr int kPacked = B * (B - 1) / 2;
constexpr int kSmallThreads = 64;

// The inverse of a in place, unpivoted; as in cayley_block, operation by operation.
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

// B is the block size. Six blocks of threads fit a multiprocessor's registers.
template <class T, int B>
__global__ void __launch_bounds__(kSmallThreads, 6)
    cayley_small_kernel(const T* skew, const bool* drop, T* blocks, int64_t n_blocks, bool vectors) {
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
  double a[B][B];  // (I - Q) / 2, the inverse of which is R + I
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

// For types that are computed in float32: in float64, the two matrices would not fit the registers.
// Those of halves need a few more than six blocks could have.
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
