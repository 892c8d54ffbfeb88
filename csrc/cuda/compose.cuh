// Butterfly factors -> dense stage matrices, and back.
//
// A block of threads has a few whole groups, and of their matrices the columns of a *slab*: to multiply
// a factor from the left leaves columns apart. Before factor i joins them in pairs, the blocks of the
// product are dense squares of b 2^(i-1); what lies outside of them is not multiplied.
#pragma once

#include "gpu.cuh"

namespace boft::cuda {

struct Butterfly {  // n factors of n_blocks blocks, the first of which has this stride
  int64_t n_blocks, groups;
  int n, stride;
  Divisor b, size;

  Butterfly(int64_t n_blocks, int64_t n, int64_t b, int64_t stride)
      : n_blocks(n_blocks), groups(n_blocks >> (n - 1)), n(int(n)), stride(int(stride)), b(int(b)),
        size(int(b << (n - 1))) {}

  // Block k of a group, among all blocks of a factor: 2^(n-1) of each.
  __device__ int64_t block(int64_t group, int k) const {
    if (stride == 1) return (group << (n - 1)) + k;
    return ((group / stride << (n - 1)) + k) * stride + group % stride;
  }
  // Before factor i > 0, the product has dense blocks of this size; and which of them has this row.
  __device__ int dense(int i) const { return b.value << (i - 1); }
  __device__ int dense_of(int row, int i) const { return (row >> (i - 1)) / b; }
};

// Where row `row` of a group meets factor i: entry e of block k, whose halves begin at these rows.
struct Meeting {
  int k, e, first, second;
};

__device__ __forceinline__ Meeting meet(const Butterfly& f, int i, int row) {
  if (i == 0) return {row / f.b, row % f.b, row - row % f.b, row - row % f.b + f.b.value / 2};
  const int r = f.b.value / 2, chunk = 2 * row / f.b;  // an even b
  const int low = chunk & ((1 << i) - 1), high = chunk >> (i + 1);
  const int begin = ((high << (i + 1)) + low) * r;
  return {(high << i) + low, (chunk >> i) % 2 * r + row - chunk * r, begin, begin + (r << i)};
}

// Groups [first, first + groups) and the slab's columns [from, from + columns) of each.
struct Slab {
  int64_t first;
  int groups, from;
  Divisor columns;
};

struct Entry {  // of a slab, at index: group, row, column of the group
  int group, row, column;
};

__device__ __forceinline__ Entry entry_at(const Butterfly& f, const Slab& s, int index) {
  const int row = index / s.columns;
  return {row / f.size, row % f.size, s.from + index % s.columns};
}

// One entry of the product of factors 0..i, from the slab `inner` of the product of those before.
template <class W>
__device__ W product_entry(const W* factors, const W* inner, const Butterfly& f, const Slab& s, int i,
                           const Entry& at) {
  const Meeting m = meet(f, i, at.row);
  const W* row =
      factors + ((i * f.n_blocks + f.block(s.first + at.group, m.k)) * f.b + m.e) * f.b;
  if (i == 0) return at.column / f.b == m.k ? row[at.column % f.b] : W(0);
  const int half = f.dense_of(at.column, i) - f.dense_of(m.first, i);
  const int r = f.b.value / 2;
  W sum = 0;
  if (half != 0 && half != 1) return sum;
  const W* column =
      inner + (at.group * f.size + (half == 0 ? m.first : m.second)) * s.columns + at.column - s.from;
  for (int q = 0; q < r; ++q) sum += row[half * r + q] * column[q * s.columns];
  return sum;
}

// The slab's columns of the stage matrices; `slabs` has room for two. No odd block is ever joined.
template <class W>
__device__ void compose_slab(W* slabs, const W* factors, W* stages, const Butterfly& f,
                             const Slab& s) {
  const int count = s.groups * f.size * s.columns;
  W *now = slabs, *before = slabs + count;
  for (int i = 0; i < f.n; ++i) {
    for (int index = int(threadIdx.x); index < count; index += int(blockDim.x))
      now[index] = product_entry(factors, before, f, s, i, entry_at(f, s, index));
    __syncthreads();
    W* const swap = now;
    now = before, before = swap;
  }
  for (int index = int(threadIdx.x); index < count; index += int(blockDim.x)) {
    const Entry at = entry_at(f, s, index);
    stages[((s.first + at.group) * f.size + at.row) * f.size + at.column] = before[index];
  }
}

// Gradient of the factors from the partial sums grad (splits, groups, size, size) of the stages', slab
// after slab; `slabs` has room for n + 1. With P the product of the factors before C, and G the
// gradient of C P: that of C is G P^T, and that of P is C^T G.
template <class W>
__device__ void compose_backward_slabs(W* slabs, const W* factors, const W* grad, W* factors_grad,
                                       const Butterfly& f, Slab s, int64_t splits) {
  const int count = s.groups * f.size * s.columns, r = f.b.value / 2;
  const int entries = s.groups * f.size * f.b;  // of the blocks of one factor
  for (s.from = 0; s.from < f.size; s.from += s.columns) {
    W *now = slabs + (f.n - 1) * count, *next = now + count;
    for (int index = int(threadIdx.x); index < count; index += int(blockDim.x)) {
      const Entry at = entry_at(f, s, index);
      const int64_t matrix = s.first + at.group;
      W sum = 0;  // in order: the same in every run
#pragma unroll 4  // so many are on their way at a time
      for (int64_t split = 0; split < splits; ++split)
        sum += grad[((split * f.groups + matrix) * f.size + at.row) * f.size + at.column];
      now[index] = sum;
    }
    for (int i = 0; i < f.n - 1; ++i) {
      W* product = slabs + i * count;
      for (int index = int(threadIdx.x); index < count; index += int(blockDim.x))
        product[index] = product_entry(factors, product - count, f, s, i, entry_at(f, s, index));
      __syncthreads();
    }
    for (int i = f.n - 1; i > 0; --i) {
      const W* product = slabs + (i - 1) * count;
      const int dense = f.dense(i);
      for (int index = int(threadIdx.x); index < entries; index += int(blockDim.x)) {
        const int place = index / f.b / f.b, k = place & ((1 << (f.n - 1)) - 1);
        const int to = index % f.b, e = index / f.b % f.b, group = place >> (f.n - 1);
        const int low = k & ((1 << i) - 1), begin = (((k >> i) << (i + 1)) + low) * r;
        const int row = begin + (e < r ? e : e - r + (r << i));
        const int inner = begin + (to < r ? to : to - r + (r << i));
        const int left = f.dense_of(inner, i) * dense;  // where the product has entries in this row
        const W* g = now + (group * f.size + row) * s.columns - s.from;
        const W* p = product + (group * f.size + inner) * s.columns - s.from;
        const int end = left + dense < s.from + s.columns ? left + dense : s.from + s.columns;
        W sum = 0;
        for (int c = left > s.from ? left : s.from; c < end; ++c) sum += g[c] * p[c];
        W* out = factors_grad +
                 ((i * f.n_blocks + f.block(s.first + group, k)) * f.b + e) * f.b + to;
        *out = s.from == 0 ? sum : *out + sum;
      }
      for (int index = int(threadIdx.x); index < count; index += int(blockDim.x)) {
        const Entry at = entry_at(f, s, index);
        const Meeting m = meet(f, i, at.row);
        W sum = 0;
        if (f.dense_of(at.column, i) == f.dense_of(at.row, i)) {  // else nothing asks for it
          const W* column = factors +
                            (i * f.n_blocks + f.block(s.first + at.group, m.k)) * f.b * f.b + m.e;
          const W* g = now + at.group * f.size * s.columns + at.column - s.from;
          for (int e = 0; e < f.b; ++e)
            sum += column[e * f.b] * g[(e < r ? m.first + e : m.second + e - r) * s.columns];
        }
        next[index] = sum;
      }
      __syncthreads();
      W* const swap = now;
      now = next, next = swap;
    }
    for (int index = int(threadIdx.x); index < count; index += int(blockDim.x)) {
      const Entry at = entry_at(f, s, index);
      const int k = at.row / f.b;
      if (at.column / f.b != k) continue;
      factors_grad[(f.block(s.first + at.group, k) * f.b + at.row % f.b) * f.b + at.column % f.b] =
          now[index];
    }
    __syncthreads();  // before the next slab
  }
}

constexpr int kComposeThreads = 128;

__device__ __forceinline__ Slab slab_of(const Butterfly& f, int groups, const Divisor& columns) {
  const int64_t first = int64_t(blockIdx.x) * groups, rest = f.groups - first;
  return {first, rest < groups ? int(rest) : groups, 0, columns};
}

template <class W>
__global__ void __launch_bounds__(kComposeThreads, 1)
    compose_kernel(const W* factors, W* stages, Butterfly f, int groups,
                   Divisor columns) {
  Slab s = slab_of(f, groups, columns);
  for (; s.from < f.size; s.from += columns) {
    compose_slab(reinterpret_cast<W*>(shared_memory()), factors, stages, f, s);
    __syncthreads();  // before the next slab
  }
}

template <class W>
__global__ void __launch_bounds__(kComposeThreads, 1)
    compose_backward_kernel(const W* factors, const W* grad, W* factors_grad, Butterfly f,
                            int64_t splits, int groups, Divisor columns) {
  compose_backward_slabs(reinterpret_cast<W*>(shared_memory()), factors, grad, factors_grad, f,
                         slab_of(f, groups, columns), splits);
}

// How many groups a block of threads takes, and how many columns of them at a time, so that `slabs` of
// them fit into shared memory.
struct Share {
  int groups, columns;
  size_t bytes;
};

template <class W>
Share share_of(const Butterfly& f, int slabs) {
  constexpr size_t kRoom = 64 * 1024;
  int groups = 1;
  // not so many that multiprocessors of a large GPU had nothing to do
  const auto fits = [&](int n) { return n * f.size * f.size <= 1024 && n <= 64 && f.groups / n >= 512; };
  while (fits(2 * groups)) groups *= 2;
  int columns = f.size;
  const auto bytes = [&] {
    return sizeof(W) * size_t(slabs) * size_t(groups) * size_t(f.size) * size_t(columns);
  };
  while (bytes() > kRoom && groups > 1) groups /= 2;
  while (bytes() > kRoom && columns % 2 == 0) columns /= 2;
  return {groups, columns, bytes()};
}

}  // namespace boft::cuda
