// Helpers of the bindings of the CUDA kernels.
#pragma once

#include <initializer_list>

#include "binding_checks.h"
#include "binding_ops.h"
#include "boft_cuda.h"

namespace boft::binding {

// Device of a tensor and torch's current stream on that device (binding_device.cpp).
boft::cuda::Queue queue_of(const Tensor& t);

// Writes a b, plus the bias if there is one, into `out` by torch's product (binding_device.cpp).
void multiply_cuda(Tensor& out, const Tensor& a, const Tensor& b,
                   const std::optional<Tensor>& bias);

// Dtype of a tensor for the CUDA kernels; raises if they do not take it.
inline boft::cuda::DType cuda_dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return boft::cuda::DType::F32;
    case ScalarType::Double: return boft::cuda::DType::F64;
    case ScalarType::BFloat16: return boft::cuda::DType::BF16;
    case ScalarType::Half: return boft::cuda::DType::F16;
    default: break;
  }
  STD_TORCH_CHECK(false, name,
                  ": expected float32, float64, bfloat16 or float16, got another dtype");
}

// Dtype of a tensor that may be float32 or float64 only.
inline boft::cuda::DType wide_cuda_dtype_of(const Tensor& t, const char* name) {
  wide_dtype_of(t, name);
  return cuda_dtype_of(t, name);
}

// Raises unless all tensors, of which some may be null, are on the device of `first`. Torch's
// dispatcher calls a CUDA kernel if one argument is on a GPU, wherever the others are.
inline void check_device(const char* op, const Tensor& first,
                         std::initializer_list<const Tensor*> others) {
  for (const Tensor* t : others)
    STD_TORCH_CHECK(t == nullptr || t->device() == first.device(), op,
                    ": expected all tensors on one device");
}

// Address of a tensor for check_device; null if there is no tensor.
inline const Tensor* given(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

// Raises if a function of boft_cuda.h returned an error.
inline void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": CUDA error ", error, ": ", boft::cuda::error_string(error));
}

}  // namespace boft::binding
