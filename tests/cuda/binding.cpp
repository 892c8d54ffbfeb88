// The CUDA operators as CPU operators: their bindings and kernels as they are, the kernels emulated.
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <exception>

#include "binding_cuda.h"
#include "emulation.h"

extern "C" {
AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle);
AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle,
                                        AtenTensorHandle, double, double);
}

namespace boft::binding {
boft::cuda::Queue queue_of(const Tensor&) { return {0, nullptr}; }
void multiply_cuda(Tensor& out, const Tensor& a, const Tensor& b,
                   const std::optional<Tensor>& bias) {
  if (bias) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1, 1));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}
}  // namespace boft::binding

#define BOFT_API extern "C" __attribute__((visibility("default")))

// Runs the kernels, which is the default, or leaves their launches out.
BOFT_API void boft_emulated_launches(int run) { emulation::launches = run != 0; }

BOFT_API int boft_emulated_register(const char* ns, char* err, int err_len) {
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
