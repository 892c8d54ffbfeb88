// The operator linear_from_skew: all of a rotated layer in one call, from the skew-symmetric
// parameters to the output, and its gradients. Separate calls from Python take longer than the
// arithmetic of a small layer, and so do tensors that nobody else sees: the steps below work on
// pointers, and what only they need lies in one allocation.
#pragma once

#include "binding_checks.h"
#include "binding_ops.h"

namespace boft::binding {

// A layer with x (..., d), weight (n, d), and skew (m, K, b(b-1)/2) for K b = d features.
struct LayerShape {
  int64_t rows, d, n;
  Butterfly rotation;

  LayerShape(const char* op, const Tensor& x, const Tensor& weight, const Tensor& skew,
             const MaybeTensor& scale, const MaybeTensor& bias)
      : d(x.dim() > 0 ? x.size(x.dim() - 1) : 0),
        n(weight.dim() == 2 ? weight.size(0) : 0),
        rotation(skew.dim() == 3 ? skew.size(0) : 0, skew.dim() == 3 ? skew.size(1) : 0,
                 block_size(skew), 0) {
    const ScalarType dtype = x.scalar_type(), wide = compute_dtype(x);
    STD_TORCH_CHECK(d > 0 && weight.dim() == 2 && weight.size(1) == d &&
                        weight.scalar_type() == dtype && weight.is_contiguous(),
                    op, ": expected x (..., d) and a contiguous weight (n, d) of one dtype, d > 0");
    STD_TORCH_CHECK(rotation.n_blocks * rotation.b == d && skew.scalar_type() == wide, op,
                    ": skew: expected blocks for ", d, " features in the compute dtype of x");
    for (const auto* vector : {&scale, &bias})
      STD_TORCH_CHECK(!*vector || ((*vector)->dim() == 1 && (*vector)->size(0) == n &&
                                   (*vector)->is_contiguous()),
                      op, ": scale, bias: expected a contiguous (", n, ",)");
    STD_TORCH_CHECK(!scale || scale->scalar_type() == wide, op,
                    ": scale: expected the compute dtype of x");
    STD_TORCH_CHECK(!bias || bias->scalar_type() == dtype, op, ": bias: expected the dtype of x");
    rows = x.numel() / d;
  }

  int64_t size() const { return rotation.size; }
  // Numbers of the blocks (m, K, b, b), and of the stage (d / size, size, size).
  int64_t n_blocks() const { return rotation.n * d * rotation.b; }
  int64_t n_stage() const { return d * rotation.size; }

  // A tensor (..., columns) with as many rows as x, contiguous.
  Tensor rows_of(const Tensor& t, const Tensor& like, int64_t columns) const {
    STD_TORCH_CHECK(t.dim() > 0 && t.size(t.dim() - 1) == columns && t.numel() == rows * columns &&
                        t.scalar_type() == like.scalar_type(),
                    "linear_from_skew: expected ", rows, " rows of ", columns, " in the dtype of x");
    return dense(t);
  }
  // Rows (rows, n) in the shape of the output for x, and rows (rows, d) in that of x.
  Tensor output_of(const Tensor& x, const Tensor& y) const { return shaped(x, y, n); }
  Tensor input_of(const Tensor& x, const Tensor& x_grad) const { return shaped(x, x_grad, d); }

 private:
  static Tensor shaped(const Tensor& x, const Tensor& t, int64_t columns) {
    if (x.dim() == 2) return t;
    auto sizes = leading_sizes(x, 1);
    sizes.push_back(columns);
    return viewed(t, sizes);
  }
};

// Checks the other arguments of the gradients.
inline void check_layer_backward(const LayerShape& s, const Tensor& skew, const Tensor& rotation,
                                 const MaybeTensor& scale, const MaybeTensor& output,
                                 int64_t splits, bool need_bias, bool fused) {
  constexpr const char* op = "linear_from_skew_backward";
  STD_TORCH_CHECK(rotation.dim() == 1 && rotation.size(0) == s.n_blocks() + s.n_stage() &&
                      rotation.scalar_type() == skew.scalar_type() && rotation.is_contiguous(),
                  op, ": rotation: expected what linear_from_skew returned for this skew");
  STD_TORCH_CHECK(!output || scale, op, ": output: expected none without a scale");
  STD_TORCH_CHECK(splits > 0, op, ": splits: expected a positive number, got ", splits);
  STD_TORCH_CHECK(!need_bias || output || fused, op,
                  ": need_bias: expected false without an output");
}

// The bias, if the output before the scale has it in it. In half precision with a scale it has not:
// beside a large bias it would be rounded to little of what the scale is for.
inline MaybeTensor center_of(const Tensor& x, const MaybeTensor& scale, const MaybeTensor& bias) {
  return scale && compute_dtype(x) != x.scalar_type() ? std::nullopt : bias;
}

// A contiguous matrix seen as its transpose.
inline Tensor transposed(const Tensor& t) {
  const int64_t strides[] = {1, t.size(1)};
  return viewed(t, {t.size(1), t.size(0)}, strides);
}

// Address of number `index` of a tensor.
inline void* address(const Tensor& t, int64_t index = 0) {
  const int64_t bytes = t.scalar_type() == ScalarType::Double ? 8 : 4;
  return static_cast<char*>(t.mutable_data_ptr()) + index * bytes;
}

// z = x R W^T + center, whose rows R has rotated unless it is the identity.
template <class Device>
Tensor unscaled(const Device& on, const LayerShape& s, const Tensor& x, const Tensor& weight,
                const void* stage, const MaybeTensor& center, bool rotated) {
  Tensor rows = viewed(x, {s.rows, s.d});
  if (rotated) {
    const Tensor result = new_tensor(x, {s.rows, s.d});
    on.rotate(x.const_data_ptr(), stage, result.mutable_data_ptr(), s);
    rows = result;
  }
  Tensor z = new_tensor(x, {s.rows, s.n});
  on.multiply(z, rows, transposed(weight), center);
  return z;
}

// Returns y, z (rows, n), which is empty unless save_z, and `rotation`: the blocks, then the stage.
// `rotated` is false if R is known to be the identity.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> layer_forward(const Device& on, const LayerShape& s,
                                                 const Tensor& x_, const Tensor& weight,
                                                 const Tensor& rotation, const MaybeTensor& scale,
                                                 const MaybeTensor& bias, bool save_z,
                                                 bool rotated) {
  const Tensor x = dense(x_);
  const auto center = center_of(x, scale, bias);
  const Tensor z = unscaled(on, s, x, weight, address(rotation, s.n_blocks()), center, rotated);
  Tensor y = z;
  if (scale) {
    if (save_z) y = new_like(z);
    on.scale(z.const_data_ptr(), *scale, center, bias, y.mutable_data_ptr(), s.rows, s.n);
  }
  return {s.output_of(x_, y), save_z && scale ? z : new_tensor(x, {0, s.n}), rotation};
}

// The stage and its blocks in one tensor.
template <class Device>
Tensor rotation_of(const Device& on, const LayerShape& s, const Tensor& skew,
                   const MaybeTensor& drop) {
  const Tensor rotation = new_tensor(skew, {s.n_blocks() + s.n_stage()});
  on.make_stage(s.rotation, skew.const_data_ptr(), pointer<bool>(drop), address(rotation),
                address(rotation, s.n_blocks()));
  return rotation;
}

// Returns the gradients of x, skew, scale and bias; see linear_from_skew_backward.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_backward(
    const Device& on, const LayerShape& s, const Tensor& grad_, const Tensor& x_,
    const Tensor& weight, const Tensor& skew, const Tensor& rotation, const MaybeTensor& drop,
    const MaybeTensor& scale, const MaybeTensor& center, const MaybeTensor& z, int64_t splits,
    bool need_bias) {
  const Tensor grad = s.rows_of(grad_, x_, s.n), x = dense(x_);
  const int64_t n_sums = z ? on.scale_partials(s.rows, s.n) : 0, n_bias = z && !need_bias ? s.n : 0;
  const Tensor scratch =
      new_tensor(rotation, {s.n_blocks() + splits * s.n_stage() + n_sums + n_bias});
  void* const partials = address(scratch, s.n_blocks());
  void* const sums = address(scratch, s.n_blocks() + splits * s.n_stage());
  const Tensor scale_grad = new_tensor(rotation, {z ? s.n : 0});
  const Tensor bias_grad = new_tensor(rotation, {need_bias ? s.n : 0});
  Tensor z_grad = viewed(grad, {s.rows, s.n});
  if (scale) {
    z_grad = new_tensor(grad, {s.rows, s.n});
    if (z)
      on.scale_backward(grad.const_data_ptr(), z->const_data_ptr(), *scale, center,
                        z_grad.mutable_data_ptr(), sums, scale_grad.mutable_data_ptr(),
                        need_bias ? bias_grad.mutable_data_ptr()
                                  : address(scratch, scratch.numel() - s.n),
                        s.rows, s.n);
    else
      on.scale(grad.const_data_ptr(), *scale, std::nullopt, std::nullopt,
               z_grad.mutable_data_ptr(), s.rows, s.n);
  }
  Tensor rows_grad = new_tensor(x, {s.rows, s.d});
  on.multiply(rows_grad, z_grad, weight, std::nullopt);
  const Tensor x_grad = new_like(x), skew_grad = new_like(skew);
  on.rotate_backward(rows_grad.const_data_ptr(), x.const_data_ptr(),
                     address(rotation, s.n_blocks()), x_grad.mutable_data_ptr(), partials, s,
                     splits);
  on.make_stage_backward(s.rotation, address(rotation), pointer<bool>(drop), partials,
                         address(scratch), skew_grad.mutable_data_ptr(), splits);
  return {x_grad, skew_grad, scale_grad, bias_grad};
}

}  // namespace boft::binding
