// Helpers of all bindings. Only the binding files include torch, and they use its stable C ABI only
// (libtorch >= 2.10), so that one binary serves every later torch and every Python.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "boft_kernels.h"

namespace boft::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Dtype of a tensor for the CPU kernels; raises if they do not take it. `name` starts the error
// message: "op: argument".
inline boft::DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return boft::DType::F32;
    case ScalarType::Double: return boft::DType::F64;
    case ScalarType::BFloat16: return boft::DType::BF16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, ": expected float32, float64 or bfloat16, got another dtype");
}

// Dtype of a tensor that may be float32 or float64 only.
inline boft::DType wide_dtype_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double,
                  name, ": expected float32 or float64, got another dtype");
  return dtype_of(t, name);
}

// Sizes of all dimensions but the last `trailing`.
inline std::vector<int64_t> leading_sizes(const Tensor& t, int64_t trailing) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim() - trailing; ++i) sizes.push_back(t.size(i));
  return sizes;
}

inline int64_t product(const std::vector<int64_t>& sizes) {
  int64_t n = 1;
  for (int64_t s : sizes) n *= s;
  return n;
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

// True if both tensors have the same shape and dtype.
inline bool alike(const Tensor& a, const Tensor& b) {
  return same_sizes(a, b) && a.scalar_type() == b.scalar_type();
}

// Dtype that the kernels compute in: float32 for bfloat16 and float16, else the tensor's own.
inline ScalarType compute_dtype(const Tensor& t) {
  const bool half = t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half;
  return half ? ScalarType::Float : t.scalar_type();
}

// Strides of a contiguous tensor; torch allows up to 64 dimensions, a layer's x rarely has 4.
inline std::vector<int64_t> contiguous_strides(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

// Makes a contiguous tensor without initializing it, on the device of `like` and by default in its
// dtype. torch::stable::new_empty goes through the dispatcher and takes several times as long.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         std::optional<ScalarType> dtype = std::nullopt) {
  const auto strides = contiguous_strides(sizes);
  int32_t type, index, number;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  if (dtype) {
    number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &number));
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), number, type, index, &handle));
  return Tensor(handle);
}

// Makes a contiguous tensor of the shape and dtype of another one, without initializing it.
inline Tensor new_like(const Tensor& t) { return new_tensor(t, t.sizes()); }

// The numbers of a tensor under other sizes and strides: a tensor of its own to autograd, without a
// call of the dispatcher. By default the strides are those of a contiguous tensor. `skipped` numbers
// come before its first one.
inline Tensor viewed(const Tensor& t, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                     const int64_t* strides = nullptr, int64_t skipped = 0) {
  const auto contiguous = contiguous_strides(sizes);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), int64_t(sizes.size()), sizes.data(),
                                     strides ? strides : contiguous.data(), skipped, &handle));
  return Tensor(handle);
}

// Returns the tensor itself if it is contiguous, else a contiguous copy.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Address of the data of a contiguous tensor; null if there is no tensor.
template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// Raises unless the last two dimensions are equal and not 0, and there are `dim` dimensions in all;
// a `dim` of 0 allows any number of them.
inline void check_square(const Tensor& t, int64_t dim, const char* name) {
  STD_TORCH_CHECK(t.dim() >= 2 && (dim == 0 || t.dim() == dim) &&
                      t.size(t.dim() - 1) == t.size(t.dim() - 2) && t.size(t.dim() - 1) > 0,
                  name, ": expected square blocks");
}

}  // namespace boft::binding
