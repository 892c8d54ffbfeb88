// The operator rotated_linear, a rotated layer as one matrix product in float32, on a CPU, and its
// gradients.
#include "binding_ops.h"

namespace boft::binding {
namespace {

using torch::stable::parallel_for;

int64_t panels_of(int64_t rows) {
  return (rows + boft::cpu::linear_panel() - 1) / boft::cpu::linear_panel();
}

// Sizes of a call, with x (rows, d), weight (n, d) and stage (d / size, size, size).
struct Shape {
  int64_t rows, d, n, size;
  static constexpr int64_t at_once = boft::cpu::kLinearPackedRows;

  Shape(const Tensor& x, const Tensor& weight, const Tensor& stage) {
    STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) &&
                        x.scalar_type() == ScalarType::Float &&
                        weight.scalar_type() == ScalarType::Float,
                    "rotated_linear: expected x (rows, d) and weight (n, d) in float32");
    check_square(stage, 3, "rotated_linear: stage");
    rows = x.size(0), d = x.size(1), n = weight.size(0), size = stage.size(2);
    STD_TORCH_CHECK(boft::cpu::linear_takes(size) && size <= d && stage.size(0) == d / size &&
                        d % size == 0 && stage.scalar_type() == ScalarType::Float,
                    "rotated_linear: stage: expected d / size matrices in float32, of a size that "
                    "divides 192");
  }

  // Contiguous scale or bias, (n,).
  std::optional<Tensor> vector(const MaybeTensor& t) const {
    if (!t) return std::nullopt;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == n && t->scalar_type() == ScalarType::Float,
                    "rotated_linear: scale, bias: expected (n,) in float32");
    return dense(*t);
  }
  // Memory for the packed panels of at_once rows of `columns` columns.
  Tensor packed(const Tensor& like, int64_t columns) const {
    const int64_t most = std::min(rows, at_once);
    return new_tensor(like, {panels_of(most) * boft::cpu::linear_panel() * columns});
  }
};

float* data(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// Computes out[j] = sum over part of in[part][j], in double and in the order of the parts; `in` is
// (parts, n).
void sum_parts(const float* in, float* out, int64_t parts, int64_t n) {
  parallel_for(0, n, std::max<int64_t>(64, boft::cpu::grain_of(parts)),
               [&](int64_t begin, int64_t end) {
    std::vector<double> sums(size_t(end - begin));
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t j = begin; j < end; ++j) sums[size_t(j - begin)] += in[part * n + j];
    for (int64_t j = begin; j < end; ++j) out[j] = float(sums[size_t(j - begin)]);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> rotated_linear_cpu(const Tensor& x_, const Tensor& weight_,
                                              const Tensor& stage_, const MaybeTensor& scale_,
                                              const MaybeTensor& bias_, bool bias_in_z, bool save) {
  const Shape s(x_, weight_, stage_);
  save = save && scale_;
  const auto scale = s.vector(scale_), bias = s.vector(bias_);
  const Tensor x = dense(x_), weight = dense(weight_);
  const Tensor stage = dense(stage_);
  Tensor y = new_tensor(x, {s.rows, s.n});
  Tensor z = new_tensor(x, {save ? s.rows : 0, s.n});
  Tensor packed = s.packed(x, s.d);
  for (int64_t top = 0; top < s.rows; top += s.at_once) {
    const int64_t rows = std::min(s.rows - top, s.at_once);
    const float* from = data(x) + top * s.d;
    float *to = data(y) + top * s.n, *unscaled = save ? data(z) + top * s.n : nullptr;
    parallel_for(0, panels_of(rows), 1, [&](int64_t begin, int64_t end) {
      boft::cpu::linear_pack(from, data(stage), data(packed), rows, s.d, s.size, begin, end);
    });
    parallel_for(0, boft::cpu::linear_units(rows, s.n, 1), 1, [&](int64_t begin, int64_t end) {
      boft::cpu::linear(data(packed), data(weight), pointer<float>(scale), pointer<float>(bias),
                        bias_in_z ? pointer<float>(bias) : nullptr, to, unscaled, rows, s.d, s.n,
                        begin, end);
    });
  }
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rotated_linear_backward_cpu(
    const Tensor& grad_, const Tensor& x_, const Tensor& weight_, const Tensor& stage_,
    const MaybeTensor& scale_, const MaybeTensor& center_, const MaybeTensor& z_, int64_t splits,
    bool need_bias) {
  const Shape s(x_, weight_, stage_);
  STD_TORCH_CHECK(splits == 1, "rotated_linear_backward: splits: expected 1 on a CPU");
  const auto scale = s.vector(scale_), center = s.vector(center_);
  const auto fits = [&](const Tensor& t) {
    return t.dim() == 2 && t.size(0) == s.rows && t.size(1) == s.n &&
           t.scalar_type() == ScalarType::Float;
  };
  STD_TORCH_CHECK(fits(grad_) && (!z_ || fits(*z_)),
                  "rotated_linear_backward: grad, z: expected (rows, n) in float32");
  const Tensor grad = dense(grad_), x = dense(x_);
  const Tensor weight = dense(weight_);
  const Tensor stage = dense(torch::stable::transpose(stage_, 1, 2));
  const auto z = z_ ? std::optional<Tensor>(dense(*z_)) : std::nullopt;
  const int64_t blocks = (s.rows + boft::cpu::kLinearRows - 1) / boft::cpu::kLinearRows;
  const int64_t panels = panels_of(s.rows), groups = s.d / s.size;
  Tensor x_grad = new_like(x), packed = s.packed(x, s.n);
  Tensor grams = new_tensor(x, {blocks, groups, s.size, s.size});
  Tensor sums = new_tensor(x, {2, panels, s.n});
  for (int64_t top = 0; top < s.rows; top += s.at_once) {
    const int64_t rows = std::min(s.rows - top, s.at_once);
    const int64_t panel = top / boft::cpu::linear_panel(), block = top / boft::cpu::kLinearRows;
    const float *upstream = data(grad) + top * s.n;
    const float *output = z ? data(*z) + top * s.n : nullptr;
    float* scale_sums = data(sums) + panel * s.n;
    parallel_for(0, panels_of(rows), 1, [&](int64_t begin, int64_t end) {
      boft::cpu::linear_backward_pack(upstream, output, pointer<float>(scale),
                                      pointer<float>(center), data(packed), scale_sums,
                                      scale_sums + panels * s.n, rows, s.n, begin, end);
    });
    const float* from = data(x) + top * s.d;
    float *to = data(x_grad) + top * s.d, *gram = data(grams) + block * s.d * s.size;
    parallel_for(0, boft::cpu::linear_units(rows, s.d, s.size), 1, [&](int64_t begin, int64_t end) {
      boft::cpu::linear_backward(data(packed), data(weight), from, data(stage), to, gram, rows, s.d,
                                 s.n, s.size, begin, end);
    });
  }
  need_bias = need_bias || z;
  Tensor stage_grad = new_tensor(x, {1, groups, s.size, s.size});
  Tensor scale_grad = new_tensor(x, {z ? s.n : 0});
  Tensor bias_grad = new_tensor(x, {need_bias ? s.n : 0});
  sum_parts(data(grams), data(stage_grad), blocks, s.d * s.size);
  if (z) sum_parts(data(sums), data(scale_grad), panels, s.n);
  if (need_bias) sum_parts(data(sums) + panels * s.n, data(bias_grad), panels, s.n);
  return {x_grad, stage_grad, scale_grad, bias_grad};
}

}  // namespace boft::binding
