#include "cuda/cayley.cuh"

namespace boft::cuda {

const char* error_string(int error) {
#ifdef BOFT_EMULATED
  return error == 0 ? "no error" : "invalid argument";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

int cayley(const void* skew, const bool* drop, void* blocks, int64_t n_blocks, int64_t b,
           DType dtype, Queue queue) {
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
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
