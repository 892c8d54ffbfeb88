// Helpers of all CUDA kernels: number types, shared memory, launches.
#pragma once

#include "boft_cuda.h"

#ifdef BOFT_EMULATED
#include "emulation.h"  // tests/cuda: the same kernels, run on a CPU
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "once.h"
#endif

#include <type_traits>

namespace boft::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// True for the 16-bit types, "halves" below.
template <class T>
constexpr bool is_half = std::is_same_v<T, bf16> || std::is_same_v<T, fp16>;

// Type that elements of T are computed in: float32 for halves, else T.
template <class T>
using Wide = std::conditional_t<is_half<T>, float, T>;

// Converts an element to the type that it is computed in, exactly.
template <class T>
__device__ __forceinline__ Wide<T> widen(T value) {
  if constexpr (std::is_same_v<T, bf16>) return __bfloat162float(value);
  else if constexpr (std::is_same_v<T, fp16>) return __half2float(value);
  else return value;
}

// Rounds a computed number to the element type.
template <class T, class W>
__device__ __forceinline__ T narrow(W value) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(float(value));
  else if constexpr (std::is_same_v<T, fp16>) return __float2half_rn(float(value));
  else return T(value);
}

// Divisor that is known at launch: n / d and n % d multiply by its inverse, rounded up, and shift,
// since a GPU has no instruction for integer division. Exact for n from 0 to 2^31 - 1.
struct Divisor {
  uint32_t inverse;
  int shift, value;

  explicit Divisor(int value) : shift(31), value(value) {
    while ((int64_t(1) << (shift - 31)) < value) ++shift;
    inverse = uint32_t(((uint64_t(1) << shift) + uint64_t(value) - 1) / uint64_t(value));
  }
  __host__ __device__ operator int() const { return value; }
  __device__ friend int operator/(int n, const Divisor& d) {
    return int(uint64_t(uint32_t(n)) * d.inverse >> d.shift);
  }
  __device__ friend int operator%(int n, const Divisor& d) { return n - n / d * d.value; }
};

// Dynamic shared memory of a block of threads, of the size that it was launched with.
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef BOFT_EMULATED
  return emulation::block().shared;
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#endif
}

// Launches kernel(arguments...) with `blocks` blocks of `threads` threads, each with `shared` bytes
// of shared memory. Returns 0 or a CUDA error. Nothing is launched for 0 blocks.
#ifdef BOFT_EMULATED
template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared, Queue,
           A... arguments) {
  if (blocks > 0) emulation::launch(blocks, threads, shared, [=] { kernel(arguments...); });
  return 0;
}
#else
// Makes a device current for a scope. The CUDA runtime is linked statically into this library and
// keeps a current device of its own, which torch does not set.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) error = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (error == cudaSuccess) cudaSetDevice(before_);
  }
  cudaError_t error;

 private:
  int before_ = 0;
};

inline Grants grants;  // of all kernels

template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared, Queue queue,
           A... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const OnDevice scope(queue.device);
  if (scope.error != cudaSuccess) return scope.error;
  if (shared > 48 * 1024) {  // CUDA grants more to those kernels only that ask for it
    // The call takes the host time of a launch: once is enough.
    const int error = grants.once(reinterpret_cast<const void*>(kernel), queue.device, shared, [&] {
      return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    });
    if (error != cudaSuccess) return error;
  }
  kernel<<<unsigned(blocks), threads, shared, static_cast<cudaStream_t>(queue.stream)>>>(
      arguments...);
  return cudaGetLastError();
}
#endif

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

// Type as a value, to be passed to a generic lambda.
template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the element type T that `dtype` stands for.
template <class F>
int with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::F32: return f(Type<float>{});
    case DType::F64: return f(Type<double>{});
    case DType::BF16: return f(Type<bf16>{});
    case DType::F16: return f(Type<fp16>{});
  }
  return kInvalidValue;
}
// Does the same for dtypes that may be float32 or float64 only.
template <class F>
int with_wide_type(DType dtype, F f) {
  switch (dtype) {
    case DType::F32: return f(Type<float>{});
    case DType::F64: return f(Type<double>{});
    default: return kInvalidValue;
  }
}

}  // namespace boft::cuda
