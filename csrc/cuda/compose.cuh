// Product of n butterfly factors as the dense matrices of a stage, and its gradient.
//
// A block of threads has a few whole groups. It computes their matrices one *slab* of columns after
// the other, so that a slab fits into shared memory. That is possible because a factor is
// multiplied from the left, which never mixes columns. The product of the factors before factor i
// consists of dense squares of b 2^(i-1) rows, which factor i joins in pairs; nothing outside of
// them is multiplied.
#pragma once

#include "gpu.cuh"

namespace boft::cuda {

// Shape of n factors of n_blocks blocks of b x b. Factor 0 mixes chunks of b/2 features that lie
// `stride` chunks apart. The product has `groups` matrices of `size` rows.
struct Butterfly {
  int64_t n_blocks, groups;
  int n, stride;
  Divisor b, size;

  Butterfly(int64_t n_blocks, int64_t n, int64_t b, int64_t stride)
      : n_blocks(n_blocks), groups(n_blocks >> (n - 1)), n(int(n)), stride(int(stride)), b(int(b)),
        size(int(b << (n - 1))) {}

  // Index of block k < 2^(n-1) of a group, among all blocks of a factor.
  __device__ int64_t block(int64_t group, int k) const {
    if (stride == 1) return (group << (n - 1)) + k;
    return ((group / stride << (n - 1)) + k) * stride + group % stride;
  }
  // Rows of the dense squares of the product of the factors before factor i > 0.
  __device__ int dense(int i) const { return b.value << (i - 1); }
  // Number of the dense square that has this row.
  __device__ int dense_of(int row, int i) const { return (row >> (i - 1)) / b; }
};

// Row of a group as a row of factor i: it is row e of block k of the group. The two halves of that
// block multiply the rows from `first` on, and from `second` on.
struct FactorRow {
  int k, e, first, second;
};

__device__ __forceinline__ FactorRow factor_row(const Butterfly& f, int i, int row) {
  if (i == 0) return {row / f.b, row % f.b, row - row % f.b, row - row % f.b + f.b.value / 2};
  const int r = f.b.value / 2, chunk = 2 * row / f.b;  // an even b
  const int low = chunk & ((1 << i) - 1), high = chunk >> (i + 1);
  const int begin = ((high << (i + 1)) + low) * r;
  return {(high << i) + low, (chunk >> i) % 2 * r + row - chunk * r, begin, begin + (r << i)};
}

// Columns [from, from + columns) of the matrices of groups [first, first + groups). In shared
// memory it is (groups, size, columns).
struct Slab {
  int64_t first;
  int groups, from;
  Divisor columns;
};

// Group in the slab, row and column in the group's matrix, of one entry of a slab.
struct Entry {
  int group, row, column;
};

__device__ __forceinline__ Entry entry_at(const Butterfly& f, const Slab& s, int index) {
  const int row = index / s.columns;
  return {row / f.size, row % f.size, s.from + index % s.columns};
}

// Computes one entry of the product of factors 0 .. i. `inner` is the slab of the product of the
// factors before factor i.
template <class W>
__device__ W product_entry(const W* factors, const W* inner, const Butterfly& f, const Slab& s,
                           int i, const Entry& at) {
  const FactorRow m = factor_row(f, i, at.row);
  const W* row =
      factors + ((i * f.n_blocks + f.block(s.first + at.group, m.k)) * f.b + m.e) * f.b;
  if (i == 0) return at.column / f.b == m.k ? row[at.column % f.b] : W(0);
  const int half = f.dense_of(at.column, i) - f.dense_of(m.first, i);
  const int r = f.b.value / 2;
  W sum = 0;
  if (half != 0 && half != 1) return sum;
  const W* column = inner + (at.group * f.size + (half == 0 ? m.first : m.second)) * s.columns +
                    at.column - s.from;
  for (int q = 0; q < r; ++q) sum += row[half * r + q] * column[q * s.columns];
  return sum;
}

// Computes the slab's columns of the stage matrices. `slabs` is shared memory for two slabs, the
// products of i and of i + 1 factors in turn. An odd b comes with a single factor only, so no odd
// block is halved.
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

// Computes the gradients of the factors, slab after slab, from `grad` (splits, groups, size, size),
// partial sums of the gradient of the stages. If P is the product of the factors before factor C,
// and G the gradient of C P, then that of C is G P^T, and that of P is C^T G. The products P are
// computed once more, from the first factor on, then the gradients from the last factor on. `slabs`
// is shared memory for n + 1 slabs: n - 1 products and two gradients in turn.
template <class W>
__device__ void compose_backward_slabs(W* slabs, const W* factors, const W* grad, W* factors_grad,
                                       const Butterfly& f, Slab s, int64_t splits) {
  const int count = s.groups * f.size * s.columns, r = f.b.value / 2;
  const int entries = s.groups * f.size * f.b;  // entries of the blocks of one factor
  for (s.from = 0; s.from < f.size; s.from += s.columns) {
    W *now = slabs + (f.n - 1) * count, *next = now + count;
    for (int index = int(threadIdx.x); index < count; index += int(blockDim.x)) {
      const Entry at = entry_at(f, s, index);
      const int64_t matrix = s.first + at.group;
      W sum = 0;  // added up in order, so that every run gives the same bits
#pragma unroll 4  // loads under way at a time
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
        const int block = index / f.b / f.b, k = block & ((1 << (f.n - 1)) - 1);
        const int to = index % f.b, e = index / f.b % f.b, group = block >> (f.n - 1);
        const int low = k & ((1 << i) - 1), begin = (((k >> i) << (i + 1)) + low) * r;
        const int row = begin + (e < r ? e : e - r + (r << i));
        const int inner = begin + (to < r ? to : to - r + (r << i));
        const int left = f.dense_of(inner, i) * dense;  // first column of the row's dense square
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
        const FactorRow m = factor_row(f, i, at.row);
        W sum = 0;
        if (f.dense_of(at.column, i) == f.dense_of(at.row, i)) {  // outside, P is zero by structure
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

// First slab of a block of threads.
__device__ __forceinline__ Slab slab_of(const Butterfly& f, int groups, const Divisor& columns) {
  const int64_t first = int64_t(blockIdx.x) * groups, rest = f.groups - first;
  return {first, rest < groups ? int(rest) : groups, 0, columns};
}

// Computes stages (groups, size, size) from factors (n, n_blocks, b, b); a block of threads has
// `groups` groups, `columns` columns at a time.
template <class W>
__global__ void __launch_bounds__(kComposeThreads, 1)
    compose_kernel(const W* factors, W* stages, Butterfly f, int groups, Divisor columns) {
  Slab s = slab_of(f, groups, columns);
  for (; s.from < f.size; s.from += columns) {
    compose_slab(reinterpret_cast<W*>(shared_memory()), factors, stages, f, s);
    __syncthreads();  // before the next slab
  }
}

// Computes factors_grad (n, n_blocks, b, b) from grad (splits, groups of all, size, size).
template <class W>
__global__ void __launch_bounds__(kComposeThreads, 1)
    compose_backward_kernel(const W* factors, const W* grad, W* factors_grad, Butterfly f,
                            int64_t splits, int groups, Divisor columns) {
  compose_backward_slabs(reinterpret_cast<W*>(shared_memory()), factors, grad, factors_grad, f,
                         slab_of(f, groups, columns), splits);
}

// Groups of a block of threads, columns of a slab, and bytes of shared memory for `slabs` slabs.
struct Share {
  int groups, columns;
  size_t bytes;
};

// Chooses them so that the slabs fit into kRoom.
template <class W>
Share share_of(const Butterfly& f, int slabs) {
  constexpr size_t kRoom = 64 * 1024;
  int groups = 1;
  // Small groups share a block of threads, unless multiprocessors of a large GPU would be idle
  // then.
  const auto fits = [&](int n) {
    return n * f.size * f.size <= 1024 && n <= 64 && f.groups / n >= 512;
  };
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
