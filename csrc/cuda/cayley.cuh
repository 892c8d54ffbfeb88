// Cayley transform R = (I + Q)(I - Q)^-1 = 2 (I - Q)^-1 - I of many small blocks, and its gradient.
// The inverse is computed in float64, as in the reference: the error of a float32 elimination would
// grow with |Q|.
//
// A block is inverted by a team of B threads, B being b rounded up to a power of two; the padding is
// the identity and never mixes with the rest. Thread j of a team holds column j in registers, and
// publishes it in shared memory when the others need it. A broadcast read from there brings two
// doubles, where a shuffle takes two instructions for each. Blocks of b = 2, 4, 8 are transformed in
// cayley_small.cuh.
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

}  // namespace boft::cuda
