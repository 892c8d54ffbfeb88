// Where a stage's groups lie in the rows, and how tiles of rows come into shared memory and back.
//
// A tile has some rows and the features of a few neighbouring groups, sorted by group: a *band* of
// `padded` positions holds one group, or as many whole groups as fit if they are smaller than 16, as
// a matrix instruction multiplies no less. Positions without a feature stay zero. In memory the chunks
// of neighbouring groups lie side by side, and are read as runs: the permutation is index arithmetic
// here, and nowhere else.
#pragma once

#include <algorithm>

#include "ptx.cuh"

namespace boft::cuda {

constexpr int kBand = 16;  // the least width of a band

struct Layout {
  int size, chunk, stride;  // as in boft::Stage
  int padded;               // width of a band: size, rounded up to a multiple of 16
  int per_band;             // groups in a band
  int bands;                // in a tile
  int segment;              // neighbouring features that are neighbouring positions too
  int per_segment;          // bands are divided into groups by the segments of this many
  int vector;               // features that move at a time
  int tiles, across;        // tiles in a row; those that groups of one run of chunks make up
};

// Where one tile begins.
struct Place {
  int64_t group, feature;  // the first
  int groups;              // that exist
  int run;                 // features of a run
};

template <class T>
constexpr int kPad = 16 / int(sizeof(T));  // of rows in shared memory, so that they begin in turn in
                                           // different banks and stay aligned
template <class T>
constexpr int kVectors = 16 / int(sizeof(T));

// `positions` wanted in a tile; `pointers`: all addresses that rows begin at, or'ed.
template <class T>
Layout layout_of(const boft::Stage& stage, int64_t d, int positions, uintptr_t pointers) {
  Layout l;
  l.size = int(stage.size), l.chunk = int(stage.chunk), l.stride = int(stage.stride);
  l.padded = (l.size + kBand - 1) / kBand * kBand;
  l.per_band = l.size < kBand ? kBand / l.size : 1;
  l.bands = std::max(1, positions / l.padded);
  const bool strided = l.stride > 1;
  l.segment = strided ? l.chunk : l.per_band * l.size;
  l.per_segment = strided ? l.per_band : 1;
  l.vector = kVectors<T>;
  const auto fits = [&](int64_t n) { return n % l.vector == 0; };
  while (!fits(l.segment) || !fits(d) || pointers % (l.vector * sizeof(T)) != 0) l.vector /= 2;
  const int64_t groups = strided ? l.stride : d / l.size, in_tile = l.bands * l.per_band;
  l.across = int((groups + in_tile - 1) / in_tile);
  l.tiles = strided ? int(d / (int64_t(l.size) * l.stride)) * l.across : l.across;
  return l;
}

__device__ __forceinline__ Place place_of(const Layout& l, int tile, int64_t d) {
  const int in_tile = l.bands * l.per_band;
  const int first = tile % l.across * in_tile;
  const int64_t block = tile / l.across;
  if (l.stride == 1) {
    const int64_t rest = d / l.size - first;
    const int groups = rest < in_tile ? int(rest) : in_tile;
    return {first, int64_t(first) * l.size, groups, groups * l.size};
  }
  const int rest = l.stride - first, groups = rest < in_tile ? rest : in_tile;
  return {block * l.stride + first, (block * l.size / l.chunk * l.stride + first) * l.chunk, groups,
          groups * l.chunk};
}

// Calls f(feature, position, features at once) for what one thread of `threads` moves of a row, and
// for every `step`-th row from `first`: f gets the row too.
template <class F>
__device__ __forceinline__ void for_each_vector(const Layout& l, const Place& place, int thread,
                                                int threads, int rows, F f) {
  const int in_run = place.run / l.vector;
  const int in_row = l.stride == 1 ? in_run : in_run * (l.size / l.chunk);
  const int wide = in_row < threads ? in_row : threads;
  const int step = threads / wide, first = thread / wide;
  if (first >= step) return;
  for (int v = thread % wide; v < in_row; v += wide) {
    const int chunk = v / in_run, in_chunks = v % in_run * l.vector;
    const int segment = in_chunks / l.segment, rest = in_chunks % l.segment;
    const int position = segment / l.per_segment * l.padded + segment % l.per_segment * l.size +
                         chunk * l.segment + rest;
    const int64_t feature = place.feature + int64_t(chunk) * l.stride * l.chunk + in_chunks;
    for (int row = first; row < rows; row += step) f(row, feature, position);
  }
}

// Starts to load `rows` rows of x, from `row` on, into a tile: positions [from, to) of it, at the
// tile's beginning. Rows from n_rows on are zeros.
template <class T>
__device__ void load_rows(T* tile, int pitch, const T* x, int64_t row, int64_t n_rows, int64_t d,
                          const Layout& l, const Place& place, int from, int to, int rows) {
  const int64_t left = n_rows - row;
  const T* start = x + row * d;
  for_each_vector(l, place, int(threadIdx.x) % 32, 32, rows, [&](int i, int64_t feature, int at) {
    if (at < from || at >= to) return;
    T* target = tile + i * pitch + at - from;
    const T* source = start + i * d + feature;
    if (i >= left) {
      for (int k = 0; k < l.vector; ++k) target[k] = narrow<T>(0.0f);
      return;
    }
    switch (l.vector * int(sizeof(T))) {
      case 16: return copy_async<16>(target, source);
      case 8: return copy_async<8>(target, source);
      case 4: return copy_async<4>(target, source);
      default: *target = *source;  // a half on its own
    }
  });
}

// Stores positions [from, to) of a tile, as many rows of it as there are.
template <class T>
__device__ void store_rows(const T* tile, int pitch, T* y, int64_t row, int64_t n_rows, int64_t d,
                           const Layout& l, const Place& place, int from, int to, int rows) {
  const int64_t left = n_rows - row;
  T* start = y + row * d;
  for_each_vector(l, place, int(threadIdx.x) % 32, 32, left < rows ? int(left) : rows,
                  [&](int i, int64_t feature, int at) {
    if (at < from || at >= to) return;
    const T* source = tile + i * pitch + at;
    T* target = start + i * d + feature;
    switch (l.vector * int(sizeof(T))) {
      case 16: *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source); return;
      case 8: *reinterpret_cast<uint2*>(target) = *reinterpret_cast<const uint2*>(source); return;
      case 4:
        *reinterpret_cast<uint32_t*>(target) = *reinterpret_cast<const uint32_t*>(source);
        return;
      default: *target = *source;
    }
  });
}

}  // namespace boft::cuda
