// Launches of rotate.cuh, halves.cuh and strided_gram.cuh, and the choice among them.
#include "cuda/halves.cuh"
#include "cuda/strided_gram.cuh"

namespace boft::cuda {
namespace {

// Calls f(pieces, std::integral_constant<int, Width>{}) if the kernels of halves.cuh take the stage
// and the rows, else returns -1. `pointers` are the addresses of all tensors of rows, combined by
// bitwise or.
template <class T, class F>
int with_pieces(const Stage& stage, int64_t rows, int64_t d, uintptr_t pointers, F f) {
  if constexpr (is_half<T>) {
    // Rows are read in vectors of 16 bytes, and offsets from a block's first row have 32 bits.
    if (d % 8 != 0 || d >= 1 << 24 || rows > INT32_MAX - kGramRows || pointers % 16 != 0) return -1;
    const Pieces thin = pieces_of(stage, d, 32), wide = pieces_of(stage, d, 64);
    // Wider pieces are better if they make runs longer that have less than the 32 bytes of a
    // transaction.
    const bool short_runs = thin.run < 16 && wide.count > 0 && wide.run > thin.run;
    if (thin.count > 0 && !short_runs) return f(thin, std::integral_constant<int, 32>{});
    if (wide.count > 0) return f(wide, std::integral_constant<int, 64>{});
  }
  return -1;
}

// Number of blocks of threads that make up a row.
template <int Width>
int64_t blocks_across(const Pieces& pieces) {
  return divide_up(pieces.count, kLine / Width);
}
// Bytes of shared memory in which arrange() works.
template <int Width>
constexpr size_t kArrangeBytes = sizeof(uint32_t) * (kLine / Width) * kArrange<Width>;

// Launches rotate() for elements of type T, with factors if Factor.
template <class T, bool Factor>
int rotate_as(const T* x, const Wide<T>* matrices, const Wide<T>* factor, T* y, int64_t rows,
              int64_t d, Stage stage, bool transpose, Queue queue) {
  const uintptr_t pointers = address(x) | address(y);
  if constexpr (is_half<T> && !Factor) {  // that kernel has no register left for factors
    if (takes_strided<T>(stage, rows, d, pointers)) {
      const int64_t block = strided_rows(rows, d);
      return launch(rotate_strided_kernel<T>, d / kStripRow * divide_up(rows, block), kApartThreads,
                    kStridedShared, queue, x, matrices, y, int(rows), d, int(stage.stride),
                    int(block), transpose);
    }
  }
  const int done = with_pieces<T>(stage, rows, d, pointers, [&](auto pieces, auto width) {
    constexpr int kWidth = decltype(width)::value;
    const int64_t tiles = blocks_across<kWidth>(pieces);
    const int64_t block = rows_of(tiles, rows, stage.size, 128);
    return launch(rotate_halves_kernel<T, kWidth, Factor>, tiles * divide_up(rows, block), kThreads,
                  kArrangeBytes<kWidth>, queue, x, matrices, factor, y, pieces, int(rows), d,
                  int(block), transpose);
  });
  if (done >= 0) return done;
  return with_columns<kMostColumns<T>>(stage.size, [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    int64_t blocks;
    const Job job = job_of<T, kColumns>(stage, rows, d, transpose, pointers, 2, &blocks);
    return launch(rotate_kernel<T, kColumns, Factor>, blocks, 32 * kWarps<T>,
                  shared_of<T, kColumns>(job), queue, x, matrices, factor, y, job);
  });
}

// Launches rotate_backward() for elements of type T, with x_grad if XGrad.
template <class T, bool XGrad>
int gram_as(const T* x, const T* grad, const Wide<T>* matrices, T* x_grad, Wide<T>* partials,
            Wide<T>* scratch, int64_t rows, int64_t d, Stage stage, bool transpose, int64_t splits,
            Queue queue) {
  const uintptr_t pointers = address(x) | address(grad) | address(x_grad);
  if constexpr (is_half<T>) {
    // No range goes beyond the last row by more than this.
    const int64_t beyond = kPairRows * (splits + kStridedBlocks);
    if (takes_strided<T>(stage, rows + beyond, d, pointers)) {
      const int64_t ranges = scratch == nullptr ? 1 : strided_ranges(rows, d, splits);
      const int64_t block = divide_up(divide_up(rows, splits * ranges), kPairRows) * kPairRows;
      Wide<T>* const to = ranges == 1 ? partials : scratch;
      const int error = launch(gram_strided_kernel<T, XGrad>, d / kStripRow * splits * ranges,
                               kApartThreads, kStridedGramShared, queue, x, grad, matrices, x_grad,
                               to, int(rows), int(d), int(stage.stride), int(block), transpose);
      if (error != 0 || ranges == 1) return error;
      const int64_t count = d * stage.size / 4;
      return launch(sum_ranges_kernel, divide_up(splits * count, kApartThreads), kApartThreads, 0,
                    queue, reinterpret_cast<const FourSums*>(to),
                    reinterpret_cast<FourSums*>(partials), count, splits, int(ranges));
    }
  }
  const int done = with_pieces<T>(stage, rows, d, pointers, [&](auto pieces, auto width) {
    constexpr int kWidth = decltype(width)::value;
    const int64_t block = divide_up(divide_up(rows, splits), kGramRows) * kGramRows;
    const size_t shared = sizeof(T) * 4 * kGramRows * (kLine + kPad<T>) +
                          (XGrad ? kArrangeBytes<kWidth> : 0) + sizeof(int) * (kLine + 2);
    return launch(gram_halves_kernel<T, kWidth, XGrad>, splits * blocks_across<kWidth>(pieces),
                  kThreads, shared, queue, x, grad, matrices, x_grad, partials, pieces,
                  int(rows), d, int(block), transpose);
  });
  if (done >= 0) return done;
  Job job = gram_job<T>(stage, rows, d, transpose, pointers);
  return with_columns<kPositions<T>>(job.layout.padded, [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    job.rows_per_block = divide_up(divide_up(rows, splits), kGramStep<T>) * kGramStep<T>;
    size_t shared = gram_shared<T>(job);
    if (XGrad)
      shared += sizeof(T) * job.layout.bands * kColumns * size_t(job.layout.padded + kPad<T>);
    return launch(gram_kernel<T, kColumns, XGrad>, splits * gram_tiles(job), 32 * kWarps<T>, shared,
                  queue, x, grad, matrices, x_grad, partials, job);
  });
}

}  // namespace

int rotate(const void* x, const void* stages, const void* factor, void* y, int64_t rows, int64_t d,
           Stage stage, bool transpose, DType dtype, Queue queue) {
  if (rows == 0) return 0;
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto with_factor) {
      return rotate_as<T, decltype(with_factor)::value>(
          static_cast<const T*>(x), static_cast<const Wide<T>*>(stages),
          static_cast<const Wide<T>*>(factor), static_cast<T*>(y), rows, d, stage, transpose,
          queue);
    };
    return factor == nullptr ? run(std::false_type{}) : run(std::true_type{});
  });
}

int64_t rotate_backward_ranges(int64_t rows, int64_t d, Stage stage, int64_t splits, DType dtype) {
  const bool half = dtype == DType::BF16 || dtype == DType::F16;
  return half && takes_strided<bf16>(stage, rows, d, 0) ? strided_ranges(rows, d, splits) : 1;
}

int rotate_backward(const void* grad, const void* x, const void* stages, void* x_grad,
                    void* partials, void* scratch, int64_t rows, int64_t d, Stage stage,
                    bool transpose, int64_t splits, DType dtype, Queue queue) {
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto gram = [&](auto fused) {
      return gram_as<T, decltype(fused)::value>(
          static_cast<const T*>(x), static_cast<const T*>(grad),
          static_cast<const Wide<T>*>(stages), static_cast<T*>(x_grad),
          static_cast<Wide<T>*>(partials), static_cast<Wide<T>*>(scratch), rows, d, stage,
          transpose, splits, queue);
    };
    if (x_grad == nullptr) return gram(std::false_type{});
    if (stage.size <= kPositions<T>) return gram(std::true_type{});
    // A group is too large for one tile: two launches, each of which reads grad.
    const int error = rotate(grad, stages, nullptr, x_grad, rows, d, stage, !transpose, dtype, queue);
    return error != 0 ? error : gram(std::false_type{});
  });
}

}  // namespace boft::cuda
