#include "cuda/rotate_pair.cuh"

#include <algorithm>

namespace boft::cuda {
namespace {

constexpr int64_t kMostShared = 227 * 1024;  // of a block of threads, on GPUs that have the most

int64_t shared_bytes(const Stage& first, const Stage& second, int buffers) {
  const int64_t span = pair_span(first, second);
  return 2 * (pair_halves(int(span), int(first.size)) + pair_halves(int(span), int(second.size)) +
              buffers * kPairWarps * kPairRows * (span + kHalfPad));
}

}  // namespace

int64_t pair_span(const Stage& first, const Stage& second) {
  return std::max(first.size * first.stride, second.size * second.stride);
}

bool takes_pair(const Stage& first, const Stage& second) {
  for (const Stage* s : {&first, &second})
    if ((s->size != 16 && s->size != 32 && s->size != 64) || s->chunk % 2 != 0 || s->stride > 1024)
      return false;
  const int64_t span = pair_span(first, second);
  return span <= 1024 && span % (first.size * first.stride) == 0 &&
         span % (second.size * second.stride) == 0 && shared_bytes(first, second, 1) <= kMostShared;
}

int rotate_pair(const void* x, const void* first, const void* second, void* y, int64_t rows,
                int64_t d, Stage first_stage, Stage second_stage, bool transpose, DType dtype,
                Queue queue) {
  if (!takes_pair(first_stage, second_stage)) return kInvalidValue;
  const auto given = [](const Stage& s) {
    return PairStage{int(s.size), Divisor(int(s.chunk)), Divisor(int(s.stride))};
  };
  PairStage one = given(first_stage), two = given(second_stage);
  if (!transpose) {  // x R meets the second first
    std::swap(one, two);
    std::swap(first, second);
  }
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const bool vectors = (address(x) | address(y) | address(first) | address(second)) % 16 == 0;
  const int span = int(pair_span(first_stage, second_stage)), at_once = vectors ? 8 : 1;
  const int buffers = shared_bytes(first_stage, second_stage, 2) <= kMostShared / 2 ? 2 : 1;
  const int64_t bytes = shared_bytes(first_stage, second_stage, buffers);
  // a block reads 4 (S1 + S2) bytes of matrices for each feature of its span, and moves 4 for each row:
  // with 8 (S1 + S2) rows, eight times as much. Fewer where multiprocessors would have nothing to do
  constexpr int64_t kStep = kPairWarps * kPairRows, kLargeGpu = 132;
  const int64_t wanted = bytes <= kMostShared / 2 ? 2 * kLargeGpu : kLargeGpu;
  const int64_t turns = std::min<int64_t>(8 * (first_stage.size + second_stage.size) / kStep,
                                          d / span * rows / (kStep * wanted));
  const PairJob job{rows, d, kStep * std::max<int64_t>(1, turns), {one, two}, span, buffers,
                    Divisor(span / at_once), at_once, transpose};
  const int64_t blocks = d / span * ((rows + job.rows_per_block - 1) / job.rows_per_block);
  const auto run = [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(rotate_pair_kernel<T>, blocks, 32 * kPairWarps,
                  size_t(bytes), queue,
                  static_cast<const T*>(x), static_cast<const float*>(first),
                  static_cast<const float*>(second), static_cast<T*>(y), job);
  };
  if (dtype == DType::BF16) return run(Type<bf16>{});
  if (dtype == DType::F16) return run(Type<fp16>{});
  return kInvalidValue;
}

}  // namespace boft::cuda
