// Layout of a stage's groups in rows, and copies of tiles of rows to shared memory and back.
//
// A tile consists of some rows, and of the features of a few neighboring groups. In shared memory
// the features of a row are sorted by group, at *positions*: a *band* of `padded` positions holds
// one group. If groups are smaller than 16, it holds as many whole groups as fit, because a matrix
// instruction multiplies no less than 16 columns. Positions without a feature stay zero. In global
// memory the chunks of neighboring groups lie side by side, and are read as one *run* of features.
// The permutation of a strided stage is index arithmetic in this file, and nowhere else.
#pragma once

#include <algorithm>

#include "ptx.cuh"

namespace boft::cuda {

constexpr int kBand = 16;  // least width of a band, in positions

// Layout of a stage in rows of d features, the same for all tiles.
struct Layout {
  int size, chunk, stride;  // as in boft::Stage
  int padded;               // width of a band: size, rounded up to a multiple of 16
  int per_band;             // groups in a band
  int bands;                // bands in a tile
  int segment;              // features that are neighbors in a run and at positions too
  int per_segment;          // segments of a run that lie in one band
  int vector;               // features that a thread copies at a time
  int tiles, across;        // tiles in a row; tiles of the groups whose chunks make up one run
};

// Beginning and extent of one tile in a row.
struct Origin {
  int64_t group, feature;  // first group, and first feature of it
  int groups;              // groups that exist; the last tile may have less than the others
  int run;                 // features of a run
};

// Elements behind each row in shared memory: neighboring rows begin in different banks and stay
// aligned to 16 bytes.
template <class T>
constexpr int kPad = 16 / int(sizeof(T));
// Elements of 16 bytes.
template <class T>
constexpr int kVectors = 16 / int(sizeof(T));

// Layout of a stage. `positions` is the width that a tile should have, at least one band;
// `pointers` are the addresses of all tensors of rows, combined by bitwise or, to find how many
// features can move at a time.
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

// Origin of tile number `tile` of a row.
__device__ __forceinline__ Origin origin_of(const Layout& l, int tile, int64_t d) {
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

// Calls f(row, feature, position) for each vector of l.vector features of a tile of `rows` rows
// that thread number `thread` of `threads` copies. Threads that are neighbors copy neighboring
// vectors of a row; if a row has less vectors than there are threads, several rows are copied at a
// time.
template <class F>
__device__ __forceinline__ void for_each_vector(const Layout& l, const Origin& origin, int thread,
                                                int threads, int rows, F f) {
  const int in_run = origin.run / l.vector;
  const int in_row = l.stride == 1 ? in_run : in_run * (l.size / l.chunk);
  const int wide = in_row < threads ? in_row : threads;
  const int step = threads / wide, first = thread / wide;
  if (first >= step) return;
  for (int v = thread % wide; v < in_row; v += wide) {
    const int chunk = v / in_run, in_chunks = v % in_run * l.vector;
    const int segment = in_chunks / l.segment, rest = in_chunks % l.segment;
    const int position = segment / l.per_segment * l.padded + segment % l.per_segment * l.size +
                         chunk * l.segment + rest;
    const int64_t feature = origin.feature + int64_t(chunk) * l.stride * l.chunk + in_chunks;
    for (int row = first; row < rows; row += step) f(row, feature, position);
  }
}

// Starts to load rows [row, row + rows) of x (n_rows, d) into a tile, for a warp. Only positions
// [from, to) are loaded, to the columns [0, to - from) of `tile`, whose rows lie `pitch` apart.
// Rows from n_rows on become zeros. close_copies() has to follow.
template <class T>
__device__ void load_rows(T* tile, int pitch, const T* x, int64_t row, int64_t n_rows, int64_t d,
                          const Layout& l, const Origin& origin, int from, int to, int rows) {
  const int64_t left = n_rows - row;
  const T* start = x + row * d;
  for_each_vector(l, origin, int(threadIdx.x) % 32, 32, rows, [&](int i, int64_t feature, int at) {
    if (at < from || at >= to) return;
    T* target = tile + i * pitch + at - from;
    const T* source = start + i * d + feature;
    if (i >= left) {
      for (int k = 0; k < l.vector; ++k) target[k] = narrow<T>(0.0f);
      return;
    }
    switch (l.vector * int(sizeof(T))) {  // bytes
      case 16: return copy_async<16>(target, source);
      case 8: return copy_async<8>(target, source);
      case 4: return copy_async<4>(target, source);
      default: *target = *source;  // one half, for which there is no asynchronous copy
    }
  });
}

// Stores positions [from, to) of a tile as rows [row, row + rows) of y, but none from n_rows on,
// for a warp. Unlike in load_rows, position p is column p of `tile`.
template <class T>
__device__ void store_rows(const T* tile, int pitch, T* y, int64_t row, int64_t n_rows, int64_t d,
                           const Layout& l, const Origin& origin, int from, int to, int rows) {
  const int64_t left = n_rows - row;
  T* start = y + row * d;
  for_each_vector(l, origin, int(threadIdx.x) % 32, 32, left < rows ? int(left) : rows,
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
