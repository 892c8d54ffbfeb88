// Launches of compose.cuh.
#include "cuda/compose.cuh"

namespace boft::cuda {

int compose(const void* factors, void* stages, int64_t n, int64_t n_blocks, int64_t b,
            int64_t stride, DType dtype, Queue queue) {
  return with_wide_type(dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    const Butterfly f(n_blocks, n, b, stride);
    const Share share = share_of<W>(f, 2);
    return launch(compose_kernel<W>, (f.groups + share.groups - 1) / share.groups, kComposeThreads,
                  share.bytes, queue, static_cast<const W*>(factors), static_cast<W*>(stages), f,
                  share.groups, Divisor(share.columns));
  });
}

int compose_backward(const void* factors, const void* grad, void* factors_grad, int64_t n,
                     int64_t n_blocks, int64_t b, int64_t stride, int64_t splits, DType dtype,
                     Queue queue) {
  return with_wide_type(dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    const Butterfly f(n_blocks, n, b, stride);
    const Share share = share_of<W>(f, int(n) + 1);
    return launch(compose_backward_kernel<W>, (f.groups + share.groups - 1) / share.groups,
                  kComposeThreads, share.bytes, queue, static_cast<const W*>(factors),
                  static_cast<const W*>(grad), static_cast<W*>(factors_grad), f, splits,
                  share.groups, Divisor(share.columns));
  });
}

}  // namespace boft::cuda
