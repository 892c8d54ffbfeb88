// The operator linear_from_skew on a GPU. The products are torch's own.
#ifdef BOFT_OPS_CUDA
#include "binding_cuda.h"
#include "binding_layer.h"

namespace boft::binding {
namespace {

// The steps of a layer, launched on torch's current stream. `scale_base` is added to its scale.
class Cuda {
 public:
  Cuda(const char* op, const Tensor& x, int64_t scale_base)
      : op_(op),
        scale_base_(int(scale_base)),
        dtype_(cuda_dtype_of(x, op)),
        wide_(compute_dtype(x)),
        queue_(queue_of(x)) {}

  void make_stage(const Butterfly& r, const void* skew, const bool* drop, void* blocks,
                  void* stages) const {
    check_launch(op_, cuda::stage_from_skew(skew, drop, blocks, stages, r.n, r.n_blocks, r.b,
                                            wide_dtype(), queue_));
  }
  void make_stage_backward(const Butterfly& r, const void* blocks, const bool* drop,
                           const void* partials, void* blocks_grad, void* skew_grad,
                           int64_t splits) const {
    check_launch(op_, cuda::stage_from_skew_backward(blocks, drop, partials, blocks_grad, skew_grad,
                                                     r.n, r.n_blocks, r.b, splits, wide_dtype(),
                                                     queue_));
  }
  void rotate(const void* x, const void* stage, void* y, const LayerShape& s) const {
    check_launch(op_, cuda::rotate(x, stage, nullptr, y, s.rows, s.d, stage_of(s), false, dtype_,
                                     queue_));
  }
  void rotate_backward(const void* grad, const void* x, const void* stage, void* x_grad,
                       void* partials, const LayerShape& s, int64_t splits) const {
    check_launch(op_, cuda::rotate_backward(grad, x, stage, x_grad, partials, nullptr, s.rows, s.d,
                                            stage_of(s), false, splits, dtype_, queue_));
  }
  void multiply(Tensor& out, const Tensor& a, const Tensor& b, const MaybeTensor& bias) const {
    multiply_cuda(out, a, b, bias);
  }
  void scale(const void* x, const Tensor& scale, const MaybeTensor& center, const MaybeTensor& bias,
             void* y, int64_t rows, int64_t n) const {
    const auto wide_center = widened(center), wide_bias = widened(bias);
    check_launch(op_, cuda::scale(x, scale.const_data_ptr(), scale_base_,
                                  pointer<void>(wide_center), pointer<void>(wide_bias), y, rows, n,
                                  dtype_, queue_));
  }
  int64_t scale_partials(int64_t rows, int64_t n) const {
    return cuda::scale_splits(rows, n) * 2 * n;
  }
  void scale_backward(const void* grad, const void* z, const Tensor& scale,
                      const MaybeTensor& center, void* z_grad, void* partials, void* scale_grad,
                      void* bias_grad, int64_t rows, int64_t n) const {
    const auto wide_center = widened(center);
    check_launch(op_, cuda::scale_backward(grad, z, scale.const_data_ptr(), scale_base_,
                                           pointer<void>(wide_center), z_grad, partials, scale_grad,
                                           bias_grad, rows, n, dtype_, queue_));
  }

 private:
  static Stage stage_of(const LayerShape& s) { return {s.size(), s.size(), 1}; }
  cuda::DType wide_dtype() const {
    return wide_ == ScalarType::Double ? cuda::DType::F64 : cuda::DType::F32;
  }
  MaybeTensor widened(const MaybeTensor& t) const {
    if (!t || t->scalar_type() == wide_) return t;
    return torch::stable::to(*t, wide_);
  }

  const char* op_;
  int scale_base_;
  cuda::DType dtype_;
  ScalarType wide_;
  cuda::Queue queue_;
};

void check_size(const char* op, const LayerShape& s) {
  STD_TORCH_CHECK(s.size() <= cuda::kMaxRotation, op, ": expected stages of at most ",
                  cuda::kMaxRotation, " rows, got ", s.size());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_from_skew_cuda(
    const Tensor& x, const Tensor& weight, const Tensor& skew_, const MaybeTensor& drop_mask,
    const MaybeTensor& scale, int64_t scale_base, const MaybeTensor& bias, bool save_z, bool) {
  constexpr const char* op = "linear_from_skew";
  const LayerShape s(op, x, weight, skew_, scale, bias);
  check_size(op, s);
  check_device(op, x, {&weight, &skew_, given(drop_mask), given(scale), given(bias)});
  const auto drop = mask_of(drop_mask, {s.rotation.n, s.rotation.n_blocks});
  const Cuda on(op, x, scale_base);
  const Tensor rotation = rotation_of(on, s, dense(skew_), drop);
  return layer_forward(on, s, x, weight, rotation, scale, bias, save_z, true);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_from_skew_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& skew,
    const Tensor& rotation, const MaybeTensor& drop_mask, const MaybeTensor& scale,
    int64_t scale_base, const MaybeTensor& bias, const MaybeTensor& output, bool scaled,
    int64_t splits, bool need_bias, bool) {
  constexpr const char* op = "linear_from_skew_backward";
  const LayerShape s(op, x, weight, skew, scale, bias);
  check_size(op, s);
  check_device(op, x, {&grad, &weight, &skew, &rotation, given(drop_mask), given(scale),
                       given(bias), given(output)});
  check_layer_backward(s, skew, rotation, scale, output, splits, need_bias, false);
  STD_TORCH_CHECK(!scaled, op, ": is_scaled: expected false on a GPU");
  const auto drop = mask_of(drop_mask, {s.rotation.n, s.rotation.n_blocks});
  const auto z = output ? MaybeTensor(s.rows_of(*output, x, s.n)) : std::nullopt;
  return layer_backward(Cuda(op, x, scale_base), s, grad, x, weight, dense(skew), rotation, drop,
                        scale, center_of(x, scale, bias), z, splits, need_bias);
}

}  // namespace boft::binding
#endif
