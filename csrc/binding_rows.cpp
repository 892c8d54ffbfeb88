// Operators that read or write activations, on a CPU: rotate, rotate_indexed, scale, and their
// gradients, also by segments of rows. The kernels divide work by whole rows, groups or columns.
#include "binding_cpu.h"
#include "binding_ops.h"

namespace boft::binding {
namespace {

// Contiguous matrices of a stage as the kernels apply them: transposed for x R^T.
Tensor as_applied(const Tensor& stage, bool transpose) {
  const int64_t last = stage.dim() - 1;
  return dense(transpose ? torch::stable::transpose(stage, last - 1, last)
                                             : stage);
}

}  // namespace

void rotate_rows(const void* x, const void* stages, const void* factor, void* y, int64_t rows,
                 int64_t d, boft::Stage stage, boft::DType dtype) {
  const int64_t grain = std::max<int64_t>(8, boft::cpu::grain_of(d * stage.size));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    boft::cpu::rotate(x, stages, factor, y, d, stage, begin, end, dtype);
  });
}

void rotate_rows_backward(const void* grad, const void* x, const void* stages, void* x_grad,
                          void* stages_grad, int64_t rows, int64_t d, boft::Stage stage,
                          bool transpose, boft::DType dtype) {
  const int64_t work = std::max<int64_t>(rows, 1) * stage.size * stage.size;
  torch::stable::parallel_for(0, d / stage.size, boft::cpu::grain_of(work),
                              [&](int64_t begin, int64_t end) {
    boft::cpu::rotate_backward(grad, x, stages, x_grad, stages_grad, rows, d, stage, transpose,
                               begin, end, dtype);
  });
}

void scale_rows(const void* x, const void* scale, const void* shift, void* y, int64_t rows,
                int64_t n, boft::DType dtype) {
  const int64_t grain = std::max<int64_t>(1, boft::cpu::grain_of(n));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    boft::cpu::scale(x, scale, shift, y, n, begin, end, dtype);
  });
}

void scale_rows_backward(const void* grad, const void* x, const void* scale, const void* center,
                         void* x_grad, void* scale_grad, void* bias_grad, int64_t rows, int64_t n,
                         boft::DType dtype) {
  const int64_t grain = std::max<int64_t>(16, boft::cpu::grain_of(rows));
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    boft::cpu::scale_backward(grad, x, scale, center, x_grad, scale_grad, bias_grad, rows, n, begin,
                              end, dtype);
  });
}

Tensor rotate_cpu(const Tensor& x_, const Tensor& stage_, int64_t chunk, int64_t stride,
                  bool transpose, const MaybeTensor& factor_) {
  const auto dtype = dtype_of(x_, "rotate: x");
  const auto shape = stage_of(x_, stage_, chunk, stride);
  const Tensor x = dense(x_), stage = as_applied(stage_, transpose);
  const auto factor = factor_of(x, factor_);
  Tensor y = new_like(x);
  rotate_rows(x.const_data_ptr(), stage.const_data_ptr(), pointer<void>(factor),
              y.mutable_data_ptr(), x.size(0), x.size(1), shape, dtype);
  return y;
}

Tensor rotate_indexed_cpu(const Tensor& x_, const Tensor& stages_, const Tensor& index_,
                          int64_t chunk, int64_t stride, bool transpose) {
  const auto dtype = dtype_of(x_, "rotate_indexed: x");
  const auto shape = stage_of(x_, stages_, index_, chunk, stride);
  const Tensor x = dense(x_), stages = as_applied(stages_, transpose);
  const Tensor index = dense(index_);
  Tensor y = new_like(x);
  const void *in = x.const_data_ptr(), *matrices = stages.const_data_ptr();
  const auto* which = static_cast<const int32_t*>(index.const_data_ptr());
  void* out = y.mutable_data_ptr();
  const int64_t rows = x.size(0), d = x.size(1), n = stages.size(0);
  const int64_t grain = std::max<int64_t>(8, boft::cpu::grain_of(d * shape.size));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    boft::cpu::rotate_indexed(in, matrices, which, out, n, d, shape, begin, end, dtype);
  });
  return y;
}

namespace {

// Returns the gradient of a stage, (1, groups, size, size). If `stage` and x_grad are given, also
// fills x_grad, the gradient of x.
Tensor gram_of(const Tensor& x_, const Tensor& grad_, const boft::Stage& shape, bool transpose,
               const Tensor* stage, Tensor* x_grad) {
  const auto dtype = dtype_of(x_, "rotate_stage_grad: x");
  STD_TORCH_CHECK(alike(x_, grad_), "rotate_stage_grad: grad: expected the shape and dtype of x");
  const Tensor x = dense(x_), grad = dense(grad_);
  const int64_t rows = x.size(0), d = x.size(1), groups = d / shape.size;
  Tensor out = new_tensor(x, {1, groups, shape.size, shape.size}, compute_dtype(x));
  rotate_rows_backward(grad.const_data_ptr(), x.const_data_ptr(),
                       stage ? stage->const_data_ptr() : nullptr,
                       x_grad ? x_grad->mutable_data_ptr() : nullptr, out.mutable_data_ptr(), rows,
                       d, shape, transpose, dtype);
  return out;
}

void check_splits(int64_t splits) {
  STD_TORCH_CHECK(splits == 1, "splits: expected 1 on a CPU, got ", splits);
}

}  // namespace

Tensor rotate_stage_grad_cpu(const Tensor& x, const Tensor& grad, int64_t size, int64_t chunk, int64_t stride,
                int64_t splits) {
  check_splits(splits);
  return gram_of(x, grad, stage_of(x, size, chunk, stride), false, nullptr, nullptr);
}

std::tuple<Tensor, Tensor> rotate_backward_cpu(const Tensor& grad, const Tensor& x,
                                               const Tensor& stage_, int64_t chunk, int64_t stride,
                                               bool transpose, int64_t splits) {
  check_splits(splits);
  const auto shape = stage_of(x, stage_, chunk, stride);
  const Tensor stage = as_applied(stage_, !transpose);
  Tensor x_grad = new_like(dense(x));
  const Tensor gram = gram_of(x, grad, shape, transpose, &stage, &x_grad);
  return {x_grad, gram};
}

Tensor segment_stage_grads_cpu(const Tensor& x_, const Tensor& grad_, const Tensor& offsets_,
                               int64_t size, int64_t chunk, int64_t stride, int64_t splits) {
  check_splits(splits);
  const auto dtype = dtype_of(x_, "segment_stage_grads: x");
  const auto shape = stage_of_segments(x_, grad_, offsets_, size, chunk, stride);
  const Tensor x = dense(x_), grad = dense(grad_);
  const Tensor offsets = dense(offsets_);
  const int64_t rows = x.size(0), d = x.size(1), groups = d / size, n = offsets.size(0);
  Tensor out = new_tensor(x, {1, n, groups, size, size}, compute_dtype(x));
  const void *left = x.const_data_ptr(), *right = grad.const_data_ptr();
  const auto* ends = static_cast<const int32_t*>(offsets.const_data_ptr());
  void* to = out.mutable_data_ptr();
  const int64_t work = std::max<int64_t>(rows, 1) * size * size;
  torch::stable::parallel_for(0, groups, boft::cpu::grain_of(work),
                              [&](int64_t begin, int64_t end) {
    boft::cpu::segment_stage_grads(left, right, ends, to, n, rows, d, shape, begin, end, dtype);
  });
  return out;
}

namespace {

// Fills shift = bias - scale * center, which is exactly 0 where scale is 1 and center equals bias.
// Without a center it is the bias.
template <class C>
void shift_of(const Tensor& scale, const MaybeTensor& center, const Tensor& bias, Tensor& shift) {
  const auto data = [](const Tensor& t) { return static_cast<const C*>(t.const_data_ptr()); };
  C* out = static_cast<C*>(shift.mutable_data_ptr());
  for (int64_t j = 0; j < shift.size(0); ++j)
    out[j] = center ? data(bias)[j] - data(scale)[j] * data(*center)[j] : data(bias)[j];
}

}  // namespace

Tensor scale_cpu(const Tensor& x_, const Tensor& scale_, const MaybeTensor& center_,
                 const MaybeTensor& bias) {
  const auto dtype = dtype_of(x_, "scale: x");
  STD_TORCH_CHECK(x_.dim() == 2, "scale: x: expected (rows, n)");
  STD_TORCH_CHECK(bias || !center_, "scale: center: expected none without a bias");
  const int64_t rows = x_.size(0), n = x_.size(1);
  const auto wide = compute_dtype(x_);
  const auto vector = [&](const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n, "scale: expected vectors (n,)");
    return dense(torch::stable::to(t, wide));
  };
  const Tensor x = dense(x_), scale = vector(scale_);
  const auto center = center_ ? MaybeTensor(vector(*center_)) : std::nullopt;
  Tensor shift = torch::stable::new_zeros(scale, {n}), y = new_like(x);
  if (bias && wide == ScalarType::Double)
    shift_of<double>(scale, center, vector(*bias), shift);
  else if (bias)
    shift_of<float>(scale, center, vector(*bias), shift);
  scale_rows(x.const_data_ptr(), scale.const_data_ptr(), shift.const_data_ptr(),
             y.mutable_data_ptr(), rows, n, dtype);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> scale_backward_cpu(const Tensor& grad_, const Tensor& x_,
                                                      const MaybeTensor& scale_,
                                                      const MaybeTensor& center_) {
  const auto dtype = dtype_of(x_, "scale_backward: x");
  check_scale(grad_, x_, scale_, center_);
  const Tensor grad = dense(grad_), x = dense(x_);
  const int64_t rows = x.size(0), n = x.size(1);
  const auto wide = compute_dtype(x);
  const auto scale = scale_ ? MaybeTensor(dense(*scale_)) : std::nullopt;
  const Tensor center =
      center_ ? dense(*center_) : torch::stable::new_zeros(x, {n}, wide);
  Tensor x_grad = new_tensor(x, {scale ? rows : 0, n});
  Tensor scale_grad = new_tensor(x, {n}, wide), bias_grad = new_tensor(x, {n}, wide);
  scale_rows_backward(grad.const_data_ptr(), x.const_data_ptr(), pointer<void>(scale),
                      center.const_data_ptr(), scale ? x_grad.mutable_data_ptr() : nullptr,
                      scale_grad.mutable_data_ptr(), bias_grad.mutable_data_ptr(), rows, n, dtype);
  return {x_grad, scale_grad, bias_grad};
}

}  // namespace boft::binding
