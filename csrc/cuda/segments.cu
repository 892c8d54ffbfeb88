// Launch of segments.cuh.
#include "cuda/segments.cuh"

namespace boft::cuda {

int segment_stage_grads(const void* x, const void* grad, const int32_t* offsets, void* partials,
                        int64_t n_segments, int64_t rows, int64_t d, Stage stage, int64_t splits,
                        DType dtype, Queue queue) {
  if (n_segments == 0) return 0;
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Job job = gram_job<T>(stage, rows, d, false, address(x) | address(grad));
    return with_columns<kPositions<T>>(job.layout.padded, [&](auto columns) {
      return launch(segments_kernel<T, decltype(columns)::value>,
                    splits * n_segments * gram_tiles(job), 32 * kWarps<T>, gram_shared<T>(job),
                    queue, static_cast<const T*>(x), static_cast<const T*>(grad), offsets,
                    static_cast<Wide<T>*>(partials), int(n_segments), int(splits), job);
    });
  });
}

}  // namespace boft::cuda
