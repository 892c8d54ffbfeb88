// Shares of the butterfly blocks of all factors, in shared memory: copies from and to global memory.
#pragma once

#include "cayley_small.cuh"

namespace boft::cuda {

// The shares of a launch: a block of threads has 2^log_share blocks of each of the m factors.
struct Shares {
  int64_t n_blocks;  // of a factor
  int m, log_share;
  bool vectors;  // true if all addresses in global memory allow vectors of 16 bytes

  __device__ __forceinline__ int64_t first() const { return int64_t(blockIdx.x) << log_share; }
  // Blocks of each factor that exist; the last share may have less than the others.
  __device__ __forceinline__ unsigned count() const {
    const int64_t rest = n_blocks - first();
    return rest < 1 << log_share ? unsigned(rest) : 1u << log_share;
  }
};

// Neighboring numbers that are read and written at once.
template <int N>
struct alignas(4 * N) Piece {
  float at[N];
};

// Numbers in shared memory. Their vectors of 16 bytes are exchanged within lines of 128 bytes, so that
// threads with neighboring butterfly blocks, and with neighboring columns of neighboring rows, find
// theirs in different banks as far as possible.
struct Numbers {
  float* begin;

  // Address of number i. The others of its vector of 16 bytes lie beside it.
  __device__ __forceinline__ float* at(unsigned i) const {
    const unsigned vector = i / 4, line = vector / 8;
    return begin + (vector ^ ((line ^ line >> 1 ^ line >> 2) % 8)) * 4 + i % 4;
  }
  // The N numbers from number i on, all in one vector.
  template <int N>
  __device__ __forceinline__ Piece<N>& piece(unsigned i) const {
    return *reinterpret_cast<Piece<N>*>(at(i));
  }
  // Calls f(index, number) for N numbers from number `first` on.
  template <int N, class F>
  __device__ __forceinline__ void read(unsigned first, F f) const {
#pragma unroll
    for (int index = 0; index < N; index += 4) {
      const Piece<4> values = piece<4>(first + index);
#pragma unroll
      for (int i = 0; i < 4; ++i) f(index + i, values.at[i]);
    }
  }
};

// Divides `count` numbers among the threads of a block: calls four(i) for 4 numbers from i on, or
// one(i) for those that do not make up vectors.
template <class Four, class One>
__device__ __forceinline__ void divide_numbers(unsigned count, bool vectors, Four four, One one) {
  const unsigned whole = vectors ? count / 4 * 4 : 0;
#pragma unroll 4
  for (unsigned i = 4 * threadIdx.x; i < whole; i += 4 * blockDim.x) four(i);
  for (unsigned i = whole + threadIdx.x; i < count; i += blockDim.x) one(i);
}

// Starts to load the share of a tensor of N numbers for each block of each factor. at(i) is the place
// of number i of the share. await_copies() and a barrier have to follow.
template <int N, class At>
__device__ __forceinline__ void load_share(const Shares& s, const float* tensor, At at) {
  for (int i = 0; i < s.m; ++i) {
    const float* from = tensor + (i * s.n_blocks + s.first()) * N;
    const unsigned begin = unsigned(i << s.log_share) * N;
    divide_numbers(
        s.count() * N, s.vectors,
        [&](unsigned k) { copy_async<16>(at(begin + k), from + k); },
        [&](unsigned k) { *at(begin + k) = from[k]; });
  }
  close_copies();
}
// Stores the share.
template <int N, class At>
__device__ __forceinline__ void store_share(const Shares& s, float* tensor, At at) {
  for (int i = 0; i < s.m; ++i) {
    float* to = tensor + (i * s.n_blocks + s.first()) * N;
    const unsigned begin = unsigned(i << s.log_share) * N;
    divide_numbers(
        s.count() * N, s.vectors,
        [&](unsigned k) {
          *reinterpret_cast<Piece<4>*>(to + k) = *reinterpret_cast<Piece<4>*>(at(begin + k));
        },
        [&](unsigned k) { to[k] = *at(begin + k); });
  }
}

}  // namespace boft::cuda
