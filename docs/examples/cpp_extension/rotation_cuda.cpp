// Rotation on a GPU, with device pointers, on the default stream of the current device.
#include "rotation.h"

#include <cuda_runtime_api.h>

#include "boft_cuda.h"

namespace {

void check(int error) {
  if (error != 0) throw std::runtime_error(boft::cuda::error_string(error));
}

boft::cuda::Queue queue() {
  int device = 0;
  check(int(cudaGetDevice(&device)));
  return {device, nullptr};
}

constexpr boft::cuda::DType kFloat = boft::cuda::DType::F32;

}  // namespace

Rotation::Buffer Rotation::allocate(int64_t count) {
  void* data = nullptr;
  check(int(cudaMalloc(&data, size_t(count) * sizeof(float))));
  return {static_cast<float*>(data), [](float* data) { cudaFree(data); }};
}

void Rotation::forward(const float* skew, const float* x, float* y, int64_t rows) {
  if (size_ > boft::cuda::kMaxRotation || b_ > boft::cuda::kMaxBlock)
    throw std::invalid_argument("m, b: expected b * 2^(m-1) <= 64");
  check(boft::cuda::stage_from_skew(skew, nullptr, blocks_.get(), stages_.get(), m_, d_ / b_, b_,
                                    kFloat, queue()));
  check(boft::cuda::rotate(x, stages_.get(), nullptr, y, rows, d_, {size_, size_, 1}, false, kFloat,
                           queue()));
}

void Rotation::backward(const float* x, const float* grad, float* x_grad, float* skew_grad,
                        int64_t rows) {
  check(boft::cuda::rotate_backward(grad, x, stages_.get(), x_grad, stages_grad_.get(), nullptr,
                                    rows, d_, {size_, size_, 1}, false, kSplits, kFloat,
                                    queue()));
  check(boft::cuda::stage_from_skew_backward(blocks_.get(), nullptr, stages_grad_.get(),
                                             blocks_grad_.get(), skew_grad, m_, d_ / b_, b_,
                                             kSplits, kFloat, queue()));
}
