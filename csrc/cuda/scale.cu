// Launches of scale.cuh.
#include "cuda/scale.cuh"

#include <algorithm>

namespace boft::cuda {
namespace {

constexpr int64_t kBlocks = 384;    // blocks of threads that keep a large GPU busy
constexpr int64_t kLeastRows = 64;  // least rows of a split of the gradients
constexpr int64_t kScaleRows = 8;   // rows that a block scales

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// Calls f(std::integral_constant<int, Vector>{}) with the number of columns of a thread. `pointers`
// are the addresses of all tensors of rows, combined by bitwise or.
template <class T, class F>
int with_vector(int64_t n, uintptr_t pointers, F f) {
  constexpr int kVector = 16 / sizeof(T);
  if (pointers % 16 == 0 && n % kVector == 0) return f(std::integral_constant<int, kVector>{});
  return f(std::integral_constant<int, 1>{});
}

}  // namespace

int64_t scale_splits(int64_t rows, int64_t n) {
  const int64_t across = std::max<int64_t>(1, divide_up(n, 8 * kScaleThreads));
  const int64_t most = std::max<int64_t>(1, kBlocks / across);
  return std::clamp<int64_t>(divide_up(rows, kLeastRows), 1, most);
}

int scale(const void* x, const void* scale, int scale_base, const void* center, const void* bias,
          void* y, int64_t rows, int64_t n, DType dtype, Queue queue) {
  if (n == 0 || rows == 0) return 0;
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using W = Wide<T>;
    return with_vector<T>(n, address(x) | address(y), [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      const int64_t across = divide_up(n, kVector * kScaleThreads);
      const int64_t blocks = across * divide_up(rows, kScaleRows);
      return launch(scale_kernel<T, kVector>, blocks, kScaleThreads, 0, queue,
                    static_cast<const T*>(x), static_cast<const W*>(scale), scale_base,
                    static_cast<const W*>(center), static_cast<const W*>(bias), static_cast<T*>(y),
                    rows, n, kScaleRows, int(across));
    });
  });
}

int scale_backward(const void* grad, const void* x, const void* scale, int scale_base,
                   const void* center, void* x_grad, void* partials, void* scale_grad,
                   void* bias_grad, int64_t rows, int64_t n, DType dtype, Queue queue) {
  if (n == 0) return 0;
  const int64_t splits = scale_splits(rows, n), rows_per_block = divide_up(rows, splits);
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using W = Wide<T>;
    const uintptr_t pointers = address(grad) | address(x) | address(x_grad);
    const int error = with_vector<T>(n, pointers, [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      const int64_t across = divide_up(n, kVector * kScaleThreads);
      const auto run = [&](auto with_x_grad) {
        return launch(scale_backward_kernel<T, kVector, decltype(with_x_grad)::value>,
                      across * splits, kScaleThreads, 0, queue, static_cast<const T*>(grad),
                      static_cast<const T*>(x), static_cast<const W*>(scale), scale_base,
                      static_cast<const W*>(center), static_cast<T*>(x_grad),
                      static_cast<W*>(partials), rows, n, rows_per_block, int(across));
      };
      return x_grad == nullptr ? run(std::false_type{}) : run(std::true_type{});
    });
    if (error != 0) return error;
    return launch(sum_kernel<W>, divide_up(2 * n, kScaleThreads), kScaleThreads, 0, queue,
                  static_cast<const W*>(partials), static_cast<W*>(scale_grad),
                  static_cast<W*>(bias_grad), n, splits);
  });
}

}  // namespace boft::cuda
