// Gradients of the stages of sorted rows: a segment of neighboring rows for each stage.
#pragma once

#include "gram.cuh"

namespace boft::cuda {

// Computes gram_of() over one split of the rows of one segment. Every segment has blocks of threads
// of its own, also an empty one, which writes zeros: so no row is read twice, and no number of the
// launch depends on the offsets.
//   x, grad: (n_rows, d);  offsets: (n_segments,), the end of each segment
//   partials: (splits, n_segments, d / size, size, size)
template <class T, int Columns>
__global__ void __launch_bounds__(32 * kWarps<T>, 1)
    segments_kernel(const T* x, const T* grad, const int32_t* offsets, Wide<T>* partials,
                    int n_segments, int splits, Job job) {
  const int tiles = gram_tiles(job);
  const int64_t turn = int64_t(blockIdx.x) / tiles, segment = turn % n_segments;
  const auto end_of = [&](int64_t e) {
    const int64_t end = e < 0 ? 0 : offsets[e];
    return end < 0 ? 0 : end < job.n_rows ? end : job.n_rows;
  };
  const int64_t begin = end_of(segment - 1), end = end_of(segment);
  constexpr int64_t kStep = kGramStep<T>;
  const int64_t share = end > begin ? ((end - begin + splits - 1) / splits + kStep - 1) / kStep : 0;
  const int64_t first = begin + turn / n_segments * share * kStep;
  const int64_t last = first + share * kStep < end ? first + share * kStep : end;
  gram_of<T, Columns, false>(x, grad, nullptr, nullptr, partials, job, int(blockIdx.x) % tiles,
                             turn, first, last);
}

}  // namespace boft::cuda
