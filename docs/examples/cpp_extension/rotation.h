// y = x R and its gradients: the rotation BOFT(m, b) of rows of d features, in float32.
// rotation_cpu.cpp and rotation_cuda.cpp implement the same class, one for each device.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>

class Rotation {
 public:
  // Throws std::invalid_argument if there is no such rotation: b has to divide d and, if m > 1, be
  // even, and 2^(m-1) has to divide d / b.
  Rotation(int64_t d, int64_t m, int64_t b)
      : d_(d), m_(m), b_(b), size_(checked_size(d, m, b)),
        blocks_(allocate(d * m * b)), stages_(allocate(d * size_)),
        blocks_grad_(allocate(d * m * b)), stages_grad_(allocate(kSplits * d * size_)) {}

  // Computes y = x R. All pointers are of the device; x and y are (rows, d).
  //   skew: (m, d/b, b(b-1)/2), strict upper triangles of the Q of all blocks
  void forward(const float* skew, const float* x, float* y, int64_t rows);

  // Computes the gradients of the last call of `forward`. `grad` is that of y; x_grad and skew_grad
  // are written, not added to.
  void backward(const float* x, const float* grad, float* x_grad, float* skew_grad, int64_t rows);

 private:
  using Buffer = std::unique_ptr<float, void (*)(float*)>;
  static Buffer allocate(int64_t count);  // on the device
  static constexpr int64_t kSplits = 8;   // parts of the rows whose sums a GPU makes apart

  // Features that R mixes, one dense matrix for each group of that many.
  static int64_t checked_size(int64_t d, int64_t m, int64_t b) {
    const bool fits = m >= 1 && m < 32 && b >= 2 && d > 0 && d % b == 0;
    if (!fits || (m > 1 && (b % 2 != 0 || (d / b) % (int64_t(1) << (m - 1)) != 0)))
      throw std::invalid_argument("d, m, b: expected b to divide d and 2^(m-1) to divide d / b");
    return b << (m - 1);
  }

  int64_t d_, m_, b_, size_;
  Buffer blocks_, stages_, blocks_grad_, stages_grad_;
};
