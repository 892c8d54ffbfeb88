// The CUDA operators as CPU operators: their bindings and kernels as they are, the kernels emulated.
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <exception>

#include "binding_cuda.h"

namespace boft::binding {
boft::cuda::Queue queue_of(const Tensor&) { return {0, nullptr}; }
}  // namespace boft::binding

extern "C" __attribute__((visibility("default"))) int boft_emulated_register(const char* ns,
                                                                           char* err, int err_len) {
  using torch::stable::detail::StableLibrary;
  try {
    auto* cpu = new StableLibrary(StableLibrary::Kind::IMPL, ns, "CPU", __FILE__, __LINE__);
#define BOFT_REGISTER(OP) cpu->impl(#OP, TORCH_BOX(&boft::binding::OP##_cuda));
    BOFT_CUDA_OPS(BOFT_REGISTER)
#undef BOFT_REGISTER
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(err, size_t(err_len), "%s", e.what());
    return -1;
  }
}
