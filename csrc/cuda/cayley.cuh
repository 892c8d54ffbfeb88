// The Cayley transform of one block by a team of B threads, B the next power of two of the block size
// b; the padding is the identity and never mixes with the rest. Thread j of the team has column j.
//
// In float64, like the reference: a float32 elimination would be off by |Q| times as much. What a
// column has for the others goes through shared memory: a broadcast read brings two doubles, where a
// shuffle takes two instructions for each.
#pragma once

#include "gpu.cuh"

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
    const double inverse = 1.0 / column[0];
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

}  // namespace boft::cuda
