// Launch of rotate_indexed.cuh.
#include "cuda/rotate_indexed.cuh"

namespace boft::cuda {

int rotate_indexed(const void* x, const void* stages, const int32_t* index, void* y,
                   int64_t n_adapters, int64_t rows, int64_t d, Stage stage, bool transpose,
                   DType dtype, Queue queue) {
  if (rows == 0) return 0;
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return with_columns<kMostColumns<T>>(stage.size, [&](auto columns) {
      constexpr int kColumns = decltype(columns)::value;
      int64_t blocks;
      const Job job =
          job_of<T, kColumns>(stage, rows, d, transpose, address(x) | address(y), 1, &blocks);
      const size_t shared = shared_of<T, kColumns>(job) + sizeof(int) * kWarps<T> * kRows;
      return launch(rotate_indexed_kernel<T, kColumns>, blocks, 32 * kWarps<T>, shared, queue,
                    static_cast<const T*>(x), static_cast<const Wide<T>*>(stages), index,
                    static_cast<T*>(y), int(n_adapters), job);
    });
  });
}

}  // namespace boft::cuda
