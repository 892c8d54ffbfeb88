// What the bindings of the CUDA kernels share.
#pragma once

#include <initializer_list>

#include "binding_checks.h"
#include "binding_ops.h"
#include "boft_cuda.h"

namespace boft::binding {

// The device of a tensor and torch's current stream on it (binding_device.cpp).
boft::cuda::Queue queue_of(const Tensor& t);

inline boft::cuda::DType cuda_dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return boft::cuda::DType::F32;
    case ScalarType::Double: return boft::cuda::DType::F64;
    case ScalarType::BFloat16: return boft::cuda::DType::BF16;
    case ScalarType::Half: return boft::cuda::DType::F16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16, got another dtype");
}

inline boft::cuda::DType wide_cuda_dtype_of(const Tensor& t, const char* name) {
  wide_dtype_of(t, name);
  return cuda_dtype_of(t, name);
}

// Torch takes any mixture of devices where one of them is the kernel's.
inline void check_device(const char* op, const Tensor& first,
                         std::initializer_list<const Tensor*> others) {
  for (const Tensor* t : others)
    STD_TORCH_CHECK(t == nullptr || t->device() == first.device(), op,
                    ": expected all tensors on one device");
}

inline const Tensor* given(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

inline void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": CUDA error ", error, ": ", boft::cuda::error_string(error));
}

}  // namespace boft::binding
