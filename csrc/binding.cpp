// C functions that Python calls through ctypes. Loading the library registers nothing:
// boft_ops_register() registers the kernels under a namespace, which each copy of the Python
// package derives from its own name, so that several copies can live in one process.
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <cstring>
#include <exception>

#include "binding_ops.h"

#define BOFT_API extern "C" __attribute__((visibility("default")))

// Name of the instruction set that the CPU kernels use.
BOFT_API const char* boft_ops_isa() { return boft::cpu::isa(); }

// Names of the operators with a kernel for `device` ("cpu" or "cuda"), each followed by a comma.
BOFT_API const char* boft_ops_kernels(const char* device) {
#define BOFT_NAME(OP) #OP ","
#ifdef BOFT_OPS_CUDA
  if (std::strcmp(device, "cuda") == 0) return BOFT_CUDA_OPS(BOFT_NAME);
#endif
  return std::strcmp(device, "cpu") == 0 ? BOFT_CPU_OPS(BOFT_NAME) : "";
#undef BOFT_NAME
}

// Registers the kernels for `device` under the namespace `ns`. Returns 0, or -1 with the reason in
// `err`, which has room for err_len bytes.
BOFT_API int boft_ops_register(const char* ns, const char* device, char* err, int err_len) {
  using torch::stable::detail::StableLibrary;
  try {
    const bool cuda = std::strcmp(device, "cuda") == 0;
    // Never freed: to unregister at exit would race with torch's own static destructors.
    auto* library =
        new StableLibrary(StableLibrary::Kind::IMPL, ns, cuda ? "CUDA" : "CPU", __FILE__, __LINE__);
#ifdef BOFT_OPS_CUDA
#define BOFT_REGISTER(OP) library->impl(#OP, TORCH_BOX(&boft::binding::OP##_cuda));
    if (cuda) {
      BOFT_CUDA_OPS(BOFT_REGISTER)
    }
#undef BOFT_REGISTER
#endif
#define BOFT_REGISTER(OP) library->impl(#OP, TORCH_BOX(&boft::binding::OP##_cpu));
    if (!cuda) {
      BOFT_CPU_OPS(BOFT_REGISTER)
    }
#undef BOFT_REGISTER
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(err, size_t(err_len), "%s", e.what());
    return -1;
  }
}
