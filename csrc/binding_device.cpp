// What the bindings need of libtorch_cuda: the current stream, on which the kernels run, and matrix
// products.
#ifdef BOFT_OPS_CUDA
#include <dlfcn.h>

#include "binding_cuda.h"

namespace boft::binding {

namespace {

// A C function of libtorch_cuda, null if it has none of that name. The library is looked up at run
// time and not linked, because only a torch with CUDA has it, and this library has to load beside
// any torch.
template <class F>
F torch_cuda(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<F>(library ? dlsym(library, name) : nullptr);
}

}  // namespace

boft::cuda::Queue queue_of(const Tensor& t) {
  using Get = int32_t (*)(int32_t device, void** stream);
  static const Get get = torch_cuda<Get>("aoti_torch_get_current_cuda_stream");
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA (libtorch_cuda.so is not loaded)");
  boft::cuda::Queue queue{t.get_device_index(), nullptr};
  STD_TORCH_CHECK(get(queue.device, &queue.stream) == 0, "no current CUDA stream");
  return queue;
}

void multiply_cuda(Tensor& out, const Tensor& a, const Tensor& b,
                   const std::optional<Tensor>& bias) {
  using Handle = AtenTensorHandle;
  static const auto mm =
      torch_cuda<AOTITorchError (*)(Handle, Handle, Handle)>("aoti_torch_cuda_mm_out");
  static const auto addmm =
      torch_cuda<AOTITorchError (*)(Handle, Handle, Handle, Handle, double, double)>(
          "aoti_torch_cuda_addmm_out");
  STD_TORCH_CHECK(mm != nullptr && addmm != nullptr, "this torch has no products for CUDA");
  if (bias) {
    STABLE_TORCH_ERROR_CODE_CHECK(addmm(out.get(), bias->get(), a.get(), b.get(), 1, 1));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(mm(out.get(), a.get(), b.get()));
  }
}

}  // namespace boft::binding
#endif
