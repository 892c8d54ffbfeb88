// Cayley transform, and its gradient, of blocks of b = 2, 4, 8: they fit the registers of one thread,
// which inverts one on its own. The 32 blocks of a warp are neighbors in global memory and are copied
// through shared memory.
#pragma once

#include "cayley.cuh"

namespace boft::cuda {

// True if all addresses are multiples of 16 bytes.
template <class... P>
bool whole_vectors(const P*... addresses) {
  return ((reinterpret_cast<uintptr_t>(addresses) % 16 == 0) && ...);
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

// Block sizes for which one thread transforms a block on its own.
#define BOFT_SMALL_BLOCKS(X) X(2) X(4) X(8)

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

// Fills a with (I - Q) / 2, whose inverse is R + I, from the packed entries of Q. For a dropped block
// Q is zero.
template <int B, class T>
__device__ __forceinline__ void fill(double (&a)[B][B], const T (&values)[kPacked<B>],
                                     bool dropped) {
#pragma unroll
  for (int i = 0; i < B; ++i) {
    a[i][i] = 0.5;
#pragma unroll
    for (int j = i + 1; j < B; ++j) {
      a[j][i] = dropped ? 0.0 : double(Wide<T>(0.5) * widen(values[packed(i, j, B)]));
      a[i][j] = -a[j][i];
    }
  }
}

// Computes the gradient of the packed entries of one block in one thread, in float32.
//   block, grad: call their argument with (index, number) for the numbers of R, and of G
template <int B, class T, class Block, class Grad>
__device__ __forceinline__ void skew_gradient(T (&values)[kPacked<B>], bool dropped, Block block,
                                              Grad grad) {
  float left[B][B], middle[B][B] = {};  // I + R, (I + R)^T G
  block([&](int index, T value) {
    const int i = index / B, j = index % B;
    left[i][j] = i == j ? widen(value) + 1.0f : widen(value);
  });
  grad([&](int index, T value) {
    const float g = widen(value);
#pragma unroll
    for (int i = 0; i < B; ++i) middle[i][index % B] += left[index / B][i] * g;
  });
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
  double a[B][B];
  fill<B>(a, values, dropped);
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
  T values[kPacked<B>] = {};
  skew_gradient<B>(
      values, dropped, [&](auto f) { shared.in.blocks.read(lane, f); },
      [&](auto f) { shared.in.grad.read(lane, f); });
  __syncwarp();  // every lane has read its matrices
  shared.skew.write(lane, [&](int index) { return values[index]; });
  __syncwarp();
  shared.skew.store(skew_grad + first * kPacked<B>, count, vectors);
}

}  // namespace boft::cuda
