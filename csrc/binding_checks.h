// Checks of the operators' arguments, for every device. The kernels check nothing, and anybody can
// call an operator with any tensors, so no shape may pass that makes a kernel read outside of them.
#pragma once

#include "binding.h"

namespace boft::binding {

// Block size b of packed triangles, whose last dimension has b(b-1)/2 numbers.
inline int64_t block_size(const Tensor& skew) {
  STD_TORCH_CHECK(skew.dim() >= 1, "cayley: skew: expected at least 1 dimension");
  const int64_t packed = skew.size(skew.dim() - 1);
  int64_t b = 1;
  while (b * (b - 1) / 2 < packed) ++b;
  STD_TORCH_CHECK(b * (b - 1) / 2 == packed, "cayley: skew: expected b(b-1)/2 numbers, got ",
                  packed);
  return b;
}

// Contiguous mask of dropped blocks. `sizes` are the leading sizes of the blocks: the mask has to
// have one boolean for each.
inline std::optional<Tensor> mask_of(const std::optional<Tensor>& drop,
                                     const std::vector<int64_t>& sizes) {
  if (!drop) return std::nullopt;
  bool fits = drop->scalar_type() == ScalarType::Bool && drop->dim() == int64_t(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = drop->size(int64_t(i)) == sizes[i];
  STD_TORCH_CHECK(fits, "cayley: drop_mask: expected a boolean for each block");
  return dense(*drop);
}

// Shape of n neighboring butterfly factors and of the stage that they make. Each factor has
// n_blocks blocks of b x b. Factor 0 mixes chunks of b/2 features that lie `stride` = 2^first
// chunks apart. The stage has `groups` matrices of `size` = b 2^(n-1) rows.
struct Butterfly {
  int64_t n, n_blocks, b, stride, size, groups;

  Butterfly(int64_t n, int64_t n_blocks, int64_t b, int64_t first)
      : n(n), n_blocks(n_blocks), b(b) {
    // The limits on n and `first` only keep 1 << (first + n - 1) within 63 bits.
    STD_TORCH_CHECK((b % 2 == 0 || n == 1) && 0 < n && n < 32 && 0 <= first && first < 31 &&
                        n_blocks > 0 && n_blocks % (int64_t(1) << (first + n - 1)) == 0,
                    "compose: factors: not a butterfly");
    stride = int64_t(1) << first, size = b << (n - 1), groups = n_blocks * b / size;
  }
  static Butterfly of(const Tensor& factors, int64_t first) {
    check_square(factors, 4, "compose: factors");
    return {factors.size(0), factors.size(1), factors.size(2), first};
  }
  // Contiguous partial sums of the gradient of the stage matrices, (splits, groups, size, size).
  Tensor grad(const Tensor& t, const Tensor& factors) const {
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) > 0 && t.size(1) == groups && t.size(2) == size &&
                        t.size(3) == size && t.scalar_type() == factors.scalar_type(),
                    "compose_backward: grad: expected (splits, groups, size, size) in the dtype of "
                    "the stage matrices");
    return dense(t);
  }
};

// Layout of a stage over the features of x, (rows, d).
inline boft::Stage stage_of(const Tensor& x, int64_t size, int64_t chunk, int64_t stride) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected 2 dimensions");
  const int64_t d = x.size(1);  // size and stride are held against it first: no product overflows
  STD_TORCH_CHECK(0 < size && size <= d && 0 < chunk && chunk <= size && size % chunk == 0 &&
                      0 < stride && stride <= d / size && d % (size * stride) == 0,
                  "stage: does not fit ", d, " features");
  return {size, chunk, stride};
}

// Layout of a stage with these matrices, (d / size, size, size) in the compute dtype of x.
inline boft::Stage stage_of(const Tensor& x, const Tensor& stage, int64_t chunk, int64_t stride) {
  check_square(stage, 3, "rotate: stage");
  const auto shape = stage_of(x, stage.size(2), chunk, stride);
  STD_TORCH_CHECK(stage.size(0) * stage.size(2) == x.size(1) &&
                      stage.scalar_type() == compute_dtype(x),
                  "rotate: stage: expected d / size matrices in the dtype of x (float32 for "
                  "halves)");
  return shape;
}

// Contiguous factors of the rows of x, (rows,) in the compute dtype of x, or none.
inline std::optional<Tensor> factor_of(const Tensor& x, const std::optional<Tensor>& factor) {
  if (!factor) return std::nullopt;
  STD_TORCH_CHECK(factor->dim() == 1 && factor->size(0) == x.size(0) &&
                      factor->scalar_type() == compute_dtype(x),
                  "rotate: factor: expected (rows,) in the dtype of x (float32 for halves)");
  return dense(*factor);
}

// Layout of the stage of many adapters: `stages` is (n_adapters, d / size, size, size), and `index`
// has the number of an adapter for each row of x.
inline boft::Stage stage_of(const Tensor& x, const Tensor& stages, const Tensor& index,
                            int64_t chunk, int64_t stride) {
  check_square(stages, 4, "rotate_indexed: stages");
  const auto shape = stage_of(x, stages.size(3), chunk, stride);
  STD_TORCH_CHECK(stages.size(1) * shape.size == x.size(1) &&
                      stages.scalar_type() == compute_dtype(x),
                  "rotate_indexed: stages: expected (adapters, d / size, size, size) in the dtype "
                  "of x (float32 for halves)");
  STD_TORCH_CHECK(index.dim() == 1 && index.size(0) == x.size(0) &&
                      index.scalar_type() == ScalarType::Int,
                  "rotate_indexed: index: expected an int32 for each row of x");
  return shape;
}

// Layout of a stage over the features of x, (rows, d), whose rows lie in segments that end at
// `offsets`.
inline boft::Stage stage_of_segments(const Tensor& x, const Tensor& grad, const Tensor& offsets,
                                     int64_t size, int64_t chunk, int64_t stride) {
  const auto shape = stage_of(x, size, chunk, stride);
  STD_TORCH_CHECK(alike(x, grad),
                  "segment_stage_grads: grad: expected the shape and dtype of x");
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Int,
                  "segment_stage_grads: offsets: expected an int32 for each segment");
  return shape;
}

// Checks the arguments of scale_backward: grad and x (rows, n), scale and center (n,).
inline void check_scale(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& scale,
                        const std::optional<Tensor>& center) {
  STD_TORCH_CHECK(x.dim() == 2 && alike(x, grad),
                  "scale_backward: grad: expected the shape and dtype of x, (rows, n)");
  for (const auto* vector : {&scale, &center})
    STD_TORCH_CHECK(!*vector || ((*vector)->dim() == 1 && (*vector)->size(0) == x.size(1) &&
                                 (*vector)->scalar_type() == compute_dtype(x)),
                    "scale_backward: scale, center: expected (n,) in the dtype of x (float32 for "
                    "halves)");
}

}  // namespace boft::binding
