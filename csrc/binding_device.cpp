// Looks up torch's current CUDA stream, on which the kernels run.
#ifdef BOFT_OPS_CUDA
#include <dlfcn.h>

#include "binding_cuda.h"

namespace boft::binding {

// libtorch_cuda is looked up at run time and not linked, because only a torch with CUDA has it, and
// this library has to load beside any torch.
boft::cuda::Queue queue_of(const Tensor& t) {
  using Get = int32_t (*)(int32_t device, void** stream);
  static const Get get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Get>(found);
  }();
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA (libtorch_cuda.so is not loaded)");
  boft::cuda::Queue queue{t.get_device_index(), nullptr};
  STD_TORCH_CHECK(get(queue.device, &queue.stream) == 0, "no current CUDA stream");
  return queue;
}

}  // namespace boft::binding
#endif
