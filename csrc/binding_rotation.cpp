// Operators that make stage matrices from skew-symmetric parameters, on a CPU: cayley, compose, and
// both in one, stage_from_skew; each with its gradient.
#include "binding_cpu.h"
#include "binding_ops.h"

namespace boft::binding {
namespace {

int64_t tiles_of(int64_t n_blocks) {
  return (n_blocks + boft::cpu::kTile - 1) / boft::cpu::kTile;
}

// Calls body(begin, end) for parts of the tiles of n_blocks blocks. A part is large enough to be
// worth a thread.
template <class F>
void over_tiles(int64_t n_blocks, int64_t b, F body) {
  torch::stable::parallel_for(0, tiles_of(n_blocks), boft::cpu::grain_of(b * b * b, 2), body);
}

}  // namespace

Tensor cayley_cpu(const Tensor& skew_, const MaybeTensor& drop_) {
  const int64_t b = block_size(skew_);
  const auto dtype = dtype_of(skew_, "cayley: skew");
  const Tensor skew = dense(skew_);
  auto sizes = leading_sizes(skew, 1);
  const auto drop = mask_of(drop_, sizes);
  const int64_t n = product(sizes);
  sizes.insert(sizes.end(), {b, b});
  Tensor blocks = new_tensor(skew, sizes);
  const void* in = skew.const_data_ptr();
  void* out = blocks.mutable_data_ptr();
  over_tiles(n, b, [&](int64_t begin, int64_t end) {
    boft::cpu::cayley(in, pointer<bool>(drop), out, n, b, begin, end, dtype);
  });
  return blocks;
}

Tensor cayley_backward_cpu(const Tensor& blocks_, const MaybeTensor& drop_,
                           const Tensor& grad_) {
  check_square(blocks_, 0, "cayley_backward: blocks");
  STD_TORCH_CHECK(alike(blocks_, grad_),
                  "cayley_backward: grad: expected the shape and dtype of blocks");
  const auto dtype = dtype_of(blocks_, "cayley_backward: blocks");
  const Tensor blocks = dense(blocks_), grad = dense(grad_);
  const int64_t b = blocks.size(blocks.dim() - 1);
  auto sizes = leading_sizes(blocks, 2);
  const auto drop = mask_of(drop_, sizes);
  const int64_t n = product(sizes);
  sizes.push_back(b * (b - 1) / 2);
  Tensor skew_grad = new_tensor(blocks, sizes);
  const void *in = blocks.const_data_ptr(), *upstream = grad.const_data_ptr();
  void* out = skew_grad.mutable_data_ptr();
  over_tiles(n, b, [&](int64_t begin, int64_t end) {
    boft::cpu::cayley_backward(in, pointer<bool>(drop), upstream, out, n, b, begin, end, dtype);
  });
  return skew_grad;
}

namespace {

// Number of groups that are worth a thread. A larger share stands for more work on each group.
int64_t grain(const Butterfly& shape, int64_t share) {
  return boft::cpu::grain_of(shape.size * shape.size * shape.b, share);
}

// Contiguous gradient of the stage matrices. On a CPU it always is one part.
Tensor one_grad(const Butterfly& shape, const Tensor& grad, const Tensor& factors) {
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == 1,
                  "compose_backward: grad: expected one part of a stage matrices' gradient");
  return shape.grad(grad, factors);
}

}  // namespace

Tensor compose_cpu(const Tensor& factors_, int64_t first) {
  const auto dtype = wide_dtype_of(factors_, "compose: factors");
  const auto shape = Butterfly::of(factors_, first);
  const Tensor factors = dense(factors_);
  Tensor stages = new_tensor(factors, {shape.groups, shape.size, shape.size});
  const void* in = factors.const_data_ptr();
  void* out = stages.mutable_data_ptr();
  torch::stable::parallel_for(0, shape.groups, grain(shape, 2), [&](int64_t begin, int64_t end) {
    boft::cpu::compose(in, out, shape.n, shape.n_blocks, shape.b, shape.stride, begin, end, dtype);
  });
  return stages;
}

Tensor compose_backward_cpu(const Tensor& factors_, const Tensor& grad_, int64_t first) {
  const auto dtype = wide_dtype_of(factors_, "compose: factors");
  const auto shape = Butterfly::of(factors_, first);
  const Tensor factors = dense(factors_);
  const Tensor grad = one_grad(shape, grad_, factors_);
  Tensor factors_grad = new_like(factors);
  const void *in = factors.const_data_ptr(), *upstream = grad.const_data_ptr();
  void* out = factors_grad.mutable_data_ptr();
  torch::stable::parallel_for(0, shape.groups, grain(shape, 4), [&](int64_t begin, int64_t end) {
    boft::cpu::compose_backward(in, upstream, out, shape.n, shape.n_blocks, shape.b, shape.stride,
                                begin, end, dtype);
  });
  return factors_grad;
}

namespace {

// Calls body(first block, number of blocks) once for each factor, for its blocks in the groups
// [begin, end). They are the blocks that a thread transforms before it composes those groups.
template <class F>
void over_group_blocks(const Butterfly& shape, int64_t begin, int64_t end, F body) {
  const int64_t per_group = shape.size / shape.b;
  for (int64_t i = 0; i < shape.n; ++i)
    body(i * shape.n_blocks + begin * per_group, (end - begin) * per_group);
}

// Address of element `index` behind a pointer, for elements of byte_size bytes.
template <class P>
P behind(P pointer, int64_t index, int64_t byte_size) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<P>>, const char, char>;
  return static_cast<Byte*>(pointer) + index * byte_size;
}

}  // namespace

void make_stage(const Butterfly& shape, const void* skew, const bool* drop, void* blocks,
                void* stages, boft::DType dtype) {
  const int64_t b = shape.b, packed = b * (b - 1) / 2, width = dtype == boft::DType::F64 ? 8 : 4;
  torch::stable::parallel_for(0, shape.groups, grain(shape, 4), [&](int64_t begin, int64_t end) {
    over_group_blocks(shape, begin, end, [&](int64_t at, int64_t count) {
      boft::cpu::cayley(behind(skew, at * packed, width), drop ? drop + at : nullptr,
                        behind(blocks, at * b * b, width), count, b, 0, tiles_of(count), dtype);
    });
    boft::cpu::compose(blocks, stages, shape.n, shape.n_blocks, b, 1, begin, end, dtype);
  });
}

void make_stage_backward(const Butterfly& shape, const void* blocks, const bool* drop,
                         const void* grad, void* blocks_grad, void* skew_grad, boft::DType dtype) {
  const int64_t b = shape.b, packed = b * (b - 1) / 2, width = dtype == boft::DType::F64 ? 8 : 4;
  torch::stable::parallel_for(0, shape.groups, grain(shape, 8), [&](int64_t begin, int64_t end) {
    boft::cpu::compose_backward(blocks, grad, blocks_grad, shape.n, shape.n_blocks, b, 1, begin,
                                end, dtype);
    over_group_blocks(shape, begin, end, [&](int64_t at, int64_t count) {
      boft::cpu::cayley_backward(behind(blocks, at * b * b, width), drop ? drop + at : nullptr,
                                 behind(blocks_grad, at * b * b, width),
                                 behind(skew_grad, at * packed, width), count, b, 0,
                                 tiles_of(count), dtype);
    });
  });
}

std::tuple<Tensor, Tensor> stage_from_skew_cpu(const Tensor& skew_, const MaybeTensor& drop_) {
  const auto dtype = wide_dtype_of(skew_, "stage_from_skew: skew");
  STD_TORCH_CHECK(skew_.dim() == 3, "stage_from_skew: skew: expected 3 dimensions");
  const Butterfly shape(skew_.size(0), skew_.size(1), block_size(skew_), 0);
  const Tensor skew = dense(skew_);
  const auto drop = mask_of(drop_, {shape.n, shape.n_blocks});
  Tensor blocks = new_tensor(skew, {shape.n, shape.n_blocks, shape.b, shape.b});
  Tensor stages = new_tensor(skew, {shape.groups, shape.size, shape.size});
  make_stage(shape, skew.const_data_ptr(), pointer<bool>(drop), blocks.mutable_data_ptr(),
             stages.mutable_data_ptr(), dtype);
  return {blocks, stages};
}

Tensor stage_from_skew_backward_cpu(const Tensor& blocks_, const MaybeTensor& drop_,
                                    const Tensor& grad_) {
  const auto dtype = wide_dtype_of(blocks_, "stage_from_skew_backward: blocks");
  const auto shape = Butterfly::of(blocks_, 0);
  const Tensor blocks = dense(blocks_), grad = one_grad(shape, grad_, blocks_);
  const auto drop = mask_of(drop_, {shape.n, shape.n_blocks});
  const int64_t packed = shape.b * (shape.b - 1) / 2;
  Tensor blocks_grad = new_like(blocks);
  Tensor skew_grad = new_tensor(blocks, {shape.n, shape.n_blocks, packed});
  make_stage_backward(shape, blocks.const_data_ptr(), pointer<bool>(drop), grad.const_data_ptr(),
                      blocks_grad.mutable_data_ptr(), skew_grad.mutable_data_ptr(), dtype);
  return skew_grad;
}

}  // namespace boft::binding
