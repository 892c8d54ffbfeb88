// Launches of stage_from_skew.cuh, and of stage_small.cuh for small blocks.
#include "cuda/stage_from_skew.cuh"
#include "cuda/stage_small.cuh"

#include <algorithm>

namespace boft::cuda {
namespace {

// Largest block size of the fused kernels: with larger teams the registers would not suffice.
constexpr int64_t kLargestTeam = 32;

// Calls f(std::integral_constant<int, B>{}) if blocks of b = B have the kernels of stage_small.cuh,
// else returns -1.
template <class F>
int with_small_block(int64_t b, DType dtype, F f) {
#define BOFT_CALL(B) \
  if (b == B && dtype == DType::F32) return f(std::integral_constant<int, B>{});
  BOFT_SMALL_BLOCKS(BOFT_CALL)
#undef BOFT_CALL
  return -1;
}

int64_t grid_of(const Shares& s) { return ((s.n_blocks - 1) >> s.log_share) + 1; }

}  // namespace

int stage_from_skew(const void* skew, const bool* drop, void* blocks, void* stages, int64_t n,
             int64_t n_blocks, int64_t b, DType dtype, Queue queue) {
  const int done = with_small_block(b, dtype, [&](auto constant) {
    constexpr int B = decltype(constant)::value;
    const auto s = shares_of<B>(n_blocks, int(n), whole_vectors(skew, blocks, stages));
    return launch(stage_small_kernel<B>, grid_of(s), threads_of(s),
                  small_bytes<B>(s.m, s.log_share, false), queue, static_cast<const float*>(skew),
                  drop, static_cast<float*>(blocks), static_cast<float*>(stages), s);
  });
  if (done >= 0) return done;
  if (b > kLargestTeam) {  // a stage of at most kMaxRotation rows is one factor then: two launches
    const int error = cayley(skew, drop, blocks, n * n_blocks, b, dtype, queue);
    return error != 0 ? error : compose(blocks, stages, n, n_blocks, b, 1, dtype, queue);
  }
  return with_wide_type(dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    const Butterfly f(n_blocks, n, b, 1);
    const Share share = share_of<W>(f, 2);
    if (share.columns < f.size) return kInvalidValue;
    const int64_t grid = (f.groups + share.groups - 1) / share.groups;
#define BOFT_LAUNCH(B)                                                                           \
  if (b <= B)                                                                                    \
    return launch(stage_from_skew_kernel<W, B>, grid, kCayleyThreads<B>,                                \
                  std::max(sizeof(CayleyShared<B>), share.bytes), queue,                         \
                  static_cast<const W*>(skew), drop, static_cast<W*>(blocks),                    \
                  static_cast<W*>(stages), f, share.groups);
    BOFT_SMALL_TEAMS(BOFT_LAUNCH)
#undef BOFT_LAUNCH
    return kInvalidValue;
  });
}

int stage_from_skew_backward(const void* blocks, const bool* drop, const void* grad, void* blocks_grad,
                      void* skew_grad, int64_t n, int64_t n_blocks, int64_t b, int64_t splits,
                      DType dtype, Queue queue) {
  const int done = with_small_block(b, dtype, [&](auto constant) {
    constexpr int B = decltype(constant)::value;
    const auto s = shares_of<B>(n_blocks, int(n), whole_vectors(blocks, grad, skew_grad));
    return launch(stage_small_backward_kernel<B>, grid_of(s), threads_of(s),
                  small_bytes<B>(s.m, s.log_share, true), queue, static_cast<const float*>(blocks),
                  drop, static_cast<const float*>(grad), static_cast<float*>(skew_grad), s, splits);
  });
  if (done >= 0) return done;
  if (b > kLargestTeam) {
    const int error =
        compose_backward(blocks, grad, blocks_grad, n, n_blocks, b, 1, splits, dtype, queue);
    if (error != 0) return error;
    return cayley_backward(blocks, drop, blocks_grad, skew_grad, n * n_blocks, b, dtype, queue);
  }
  return with_wide_type(dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    const Butterfly f(n_blocks, n, b, 1);
    const Share share = share_of<W>(f, int(n) + 1);
    const int64_t grid = (f.groups + share.groups - 1) / share.groups;
#define BOFT_LAUNCH(B)                                                                           \
  if (b <= B)                                                                                    \
    return launch(stage_from_skew_backward_kernel<W, B>, grid, kCayleyThreads<B>,                       \
                  std::max(sizeof(CayleyBackwardShared<B, W>), share.bytes), queue,              \
                  static_cast<const W*>(blocks), drop, static_cast<const W*>(grad),              \
                  static_cast<W*>(blocks_grad), static_cast<W*>(skew_grad), f, splits,           \
                  share.groups, Divisor(share.columns));
    BOFT_SMALL_TEAMS(BOFT_LAUNCH)
#undef BOFT_LAUNCH
    return kInvalidValue;
  });
}

}  // namespace boft::cuda
