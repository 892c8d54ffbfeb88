// Launches of cayley_small.cuh for b = 2, 4, 8, and of cayley.cuh for any other b.
#include "cuda/cayley_small.cuh"

namespace boft::cuda {

const char* error_string(int error) {
#ifdef BOFT_EMULATED
  return error == 0 ? "no error" : "invalid argument";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

namespace {

// Blocks of threads for one thread a block.
int64_t small_grid(int64_t n_blocks) { return (n_blocks + kSmallThreads - 1) / kSmallThreads; }

}  // namespace

int cayley(const void* skew, const bool* drop, void* blocks, int64_t n_blocks, int64_t b,
           DType dtype, Queue queue) {
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
#define BOFT_LAUNCH(B)                                                                           \
  if (b == B)                                                                                    \
    return launch(cayley_small_kernel<T, B>, small_grid(n_blocks), kSmallThreads,                \
                  kSmallThreads / 32 * sizeof(CayleySmallShared<T, B>), queue,                   \
                  static_cast<const T*>(skew), drop, static_cast<T*>(blocks), n_blocks,          \
                  whole_vectors(skew, blocks));
    BOFT_SMALL_BLOCKS(BOFT_LAUNCH)
#undef BOFT_LAUNCH
#define BOFT_LAUNCH(B)                                                                            \
  if (b <= B)                                                                                     \
    return launch(cayley_kernel<T, B>, (n_blocks + kTeams<B> - 1) / kTeams<B>, kCayleyThreads<B>, \
                  sizeof(CayleyShared<B>), queue, static_cast<const T*>(skew), drop,              \
                  static_cast<T*>(blocks), n_blocks, int(b));
    BOFT_TEAMS(BOFT_LAUNCH)
#undef BOFT_LAUNCH
    return kInvalidValue;
  });
}

int cayley_backward(const void* blocks, const bool* drop, const void* grad, void* skew_grad,
                    int64_t n_blocks, int64_t b, DType dtype, Queue queue) {
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
#define BOFT_LAUNCH(B)                                                                         \
  if (b == B)                                                                                  \
    return launch(cayley_small_backward_kernel<T, B>, small_grid(n_blocks), kSmallThreads,     \
                  kSmallThreads / 32 * sizeof(CayleySmallBackwardShared<T, B>), queue,         \
                  static_cast<const T*>(blocks), drop, static_cast<const T*>(grad),            \
                  static_cast<T*>(skew_grad), n_blocks, whole_vectors(blocks, grad, skew_grad));
    if constexpr (!std::is_same_v<T, double>) {
      BOFT_SMALL_BLOCKS(BOFT_LAUNCH)
    }
#undef BOFT_LAUNCH
#define BOFT_LAUNCH(B)                                                                        \
  if (b <= B)                                                                                 \
    return launch(cayley_backward_kernel<T, B>, (n_blocks + kTeams<B> - 1) / kTeams<B>,       \
                  kCayleyThreads<B>, sizeof(CayleyBackwardShared<B, Wide<T>>), queue,         \
                  static_cast<const T*>(blocks), drop, static_cast<const T*>(grad),           \
                  static_cast<T*>(skew_grad), n_blocks, int(b));
    BOFT_TEAMS(BOFT_LAUNCH)
#undef BOFT_LAUNCH
    return kInvalidValue;
  });
}

}  // namespace boft::cuda
