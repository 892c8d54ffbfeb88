// Rotation on the CPU. The kernels do a part [begin, end) of their work and give the same bits for
// every split, so that any threads will do: here those of OpenMP.
#include "rotation.h"

#include <omp.h>

#include <utility>

#include "boft_kernels.h"

namespace {

template <class Work>
void in_parts(int64_t count, const Work& work) {
#pragma omp parallel
  {
    const int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
    const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
    if (begin < end) work(begin, end);
  }
}

constexpr boft::DType kFloat = boft::DType::F32;

}  // namespace

Rotation::Buffer Rotation::allocate(int64_t count) {
  return {new float[size_t(count)], [](float* data) { delete[] data; }};
}

void Rotation::forward(const float* skew, const float* x, float* y, int64_t rows) {
  const int64_t n_blocks = d_ / b_, tiles = (m_ * n_blocks + boft::cpu::kTile - 1) / boft::cpu::kTile;
  in_parts(tiles, [&](int64_t begin, int64_t end) {
    boft::cpu::cayley(skew, nullptr, blocks_.get(), m_ * n_blocks, b_, begin, end, kFloat);
  });
  in_parts(d_ / size_, [&](int64_t begin, int64_t end) {
    boft::cpu::compose(blocks_.get(), stages_.get(), m_, n_blocks, b_, 1, begin, end, kFloat);
  });
  in_parts(rows, [&](int64_t begin, int64_t end) {
    boft::cpu::rotate(x, stages_.get(), nullptr, y, d_, {size_, size_, 1}, begin, end, kFloat);
  });
}

void Rotation::backward(const float* x, const float* grad, float* x_grad, float* skew_grad,
                        int64_t rows) {
  const int64_t n_blocks = d_ / b_, tiles = (m_ * n_blocks + boft::cpu::kTile - 1) / boft::cpu::kTile;
  // grad meets R^T: transpose the matrices in place, since `forward` makes them anew.
  in_parts(d_ / size_, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g)
      for (int64_t i = 0; i < size_; ++i)
        for (int64_t j = 0; j < i; ++j) {
          float* group = stages_.get() + g * size_ * size_;
          std::swap(group[i * size_ + j], group[j * size_ + i]);
        }
    boft::cpu::rotate_backward(grad, x, stages_.get(), x_grad, stages_grad_.get(), rows, d_,
                               {size_, size_, 1}, false, begin, end, kFloat);
    boft::cpu::compose_backward(blocks_.get(), stages_grad_.get(), blocks_grad_.get(), m_, n_blocks,
                                b_, 1, begin, end, kFloat);
  });
  in_parts(tiles, [&](int64_t begin, int64_t end) {
    boft::cpu::cayley_backward(blocks_.get(), nullptr, blocks_grad_.get(), skew_grad, m_ * n_blocks,
                               b_, begin, end, kFloat);
  });
}
