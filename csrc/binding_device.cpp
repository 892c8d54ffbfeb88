// Where the CUDA kernels run: torch's current stream.
#ifdef BOFT_OPS_CUDA
#include <dlfcn.h>

#include "binding_cuda.h"

namespace boft::binding {

// libtorch_cuda is looked up, not linked: it exists beside a torch with CUDA only, and the same
// library is to load beside any.
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
