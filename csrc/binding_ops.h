// The operators as torch calls them. Python defines their schemas, their fake implementations, and
// the references that say what they compute.
#pragma once

#include "binding.h"

namespace boft::binding {

using MaybeTensor = std::optional<Tensor>;

Tensor cayley_cpu(const Tensor& skew, const MaybeTensor& drop);
Tensor cayley_backward_cpu(const Tensor& blocks, const MaybeTensor& drop, const Tensor& grad);
Tensor compose_cpu(const Tensor& factors, int64_t first);
Tensor compose_backward_cpu(const Tensor& factors, const Tensor& grad, int64_t first);
std::tuple<Tensor, Tensor> stage_from_skew_cpu(const Tensor& skew, const MaybeTensor& drop);
Tensor stage_from_skew_backward_cpu(const Tensor& blocks, const MaybeTensor& drop,
                                    const Tensor& grad);
Tensor rotate_cpu(const Tensor& x, const Tensor& stage, int64_t chunk, int64_t stride,
                  bool transpose, const MaybeTensor& factor);
Tensor rotate_indexed_cpu(const Tensor& x, const Tensor& stages, const Tensor& index, int64_t chunk,
                          int64_t stride, bool transpose);
std::tuple<Tensor, Tensor> rotate_backward_cpu(const Tensor& grad, const Tensor& x,
                                               const Tensor& stage, int64_t chunk, int64_t stride,
                                               bool transpose, int64_t splits);
Tensor rotate_stage_grad_cpu(const Tensor& x, const Tensor& grad, int64_t size, int64_t chunk, int64_t stride,
                int64_t splits);
Tensor segment_stage_grads_cpu(const Tensor& x, const Tensor& grad, const Tensor& offsets,
                               int64_t size, int64_t chunk, int64_t stride, int64_t splits);
Tensor scale_cpu(const Tensor& x, const Tensor& scale, const MaybeTensor& center,
                 const MaybeTensor& bias);
std::tuple<Tensor, Tensor, Tensor> scale_backward_cpu(const Tensor& grad, const Tensor& x,
                                                      const MaybeTensor& scale,
                                                      const MaybeTensor& center);
std::tuple<Tensor, Tensor> rotated_linear_cpu(const Tensor& x, const Tensor& weight,
                                              const Tensor& stage, const MaybeTensor& scale,
                                              const MaybeTensor& bias, bool bias_in_z, bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor> rotated_linear_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& stage,
    const MaybeTensor& scale, const MaybeTensor& center, const MaybeTensor& z, int64_t splits,
    bool need_bias);
std::tuple<Tensor, Tensor, Tensor> linear_from_skew_cpu(
    const Tensor& x, const Tensor& weight, const Tensor& skew, const MaybeTensor& drop_mask,
    const MaybeTensor& scale, int64_t scale_base, const MaybeTensor& bias, bool save_z, bool fused);
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_from_skew_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& skew,
    const Tensor& rotation, const MaybeTensor& drop_mask, const MaybeTensor& scale,
    int64_t scale_base, const MaybeTensor& bias, const MaybeTensor& output, bool scaled,
    int64_t splits, bool need_bias, bool fused);

Tensor cayley_cuda(const Tensor& skew, const MaybeTensor& drop);
Tensor cayley_backward_cuda(const Tensor& blocks, const MaybeTensor& drop, const Tensor& grad);
Tensor compose_cuda(const Tensor& factors, int64_t first);
Tensor compose_backward_cuda(const Tensor& factors, const Tensor& grad, int64_t first);
std::tuple<Tensor, Tensor> stage_from_skew_cuda(const Tensor& skew, const MaybeTensor& drop);
Tensor stage_from_skew_backward_cuda(const Tensor& blocks, const MaybeTensor& drop,
                                     const Tensor& grad);
Tensor rotate_cuda(const Tensor& x, const Tensor& stage, int64_t chunk, int64_t stride,
                   bool transpose, const MaybeTensor& factor);
Tensor rotate_indexed_cuda(const Tensor& x, const Tensor& stages, const Tensor& index,
                           int64_t chunk, int64_t stride, bool transpose);
std::tuple<Tensor, Tensor> rotate_backward_cuda(const Tensor& grad, const Tensor& x,
                                                const Tensor& stage, int64_t chunk, int64_t stride,
                                                bool transpose, int64_t splits);
Tensor rotate_stage_grad_cuda(const Tensor& x, const Tensor& grad, int64_t size, int64_t chunk, int64_t stride,
                 int64_t splits);
Tensor segment_stage_grads_cuda(const Tensor& x, const Tensor& grad, const Tensor& offsets,
                                int64_t size, int64_t chunk, int64_t stride, int64_t splits);
Tensor scale_cuda(const Tensor& x, const Tensor& scale, const MaybeTensor& center,
                  const MaybeTensor& bias);
std::tuple<Tensor, Tensor, Tensor> scale_backward_cuda(const Tensor& grad, const Tensor& x,
                                                       const MaybeTensor& scale,
                                                       const MaybeTensor& center);
std::tuple<Tensor, Tensor> rotated_linear_cuda(const Tensor& x, const Tensor& weight,
                                               const Tensor& stage, const MaybeTensor& scale,
                                               const MaybeTensor& bias, bool bias_in_z, bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor> rotated_linear_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& stage,
    const MaybeTensor& scale, const MaybeTensor& center, const MaybeTensor& z, int64_t splits,
    bool need_bias);
std::tuple<Tensor, Tensor, Tensor> linear_from_skew_cuda(
    const Tensor& x, const Tensor& weight, const Tensor& skew, const MaybeTensor& drop_mask,
    const MaybeTensor& scale, int64_t scale_base, const MaybeTensor& bias, bool save_z, bool fused);
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_from_skew_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& skew,
    const Tensor& rotation, const MaybeTensor& drop_mask, const MaybeTensor& scale,
    int64_t scale_base, const MaybeTensor& bias, const MaybeTensor& output, bool scaled,
    int64_t splits, bool need_bias, bool fused);

}  // namespace boft::binding

// Names of the operators with a CPU kernel: <name>_cpu is registered for each.
#define BOFT_CPU_OPS(OP)                                                                       \
  OP(cayley) OP(cayley_backward) OP(compose) OP(compose_backward) OP(stage_from_skew)          \
  OP(stage_from_skew_backward) OP(rotate) OP(rotate_indexed) OP(rotate_backward) OP(rotate_stage_grad)      \
  OP(segment_stage_grads) OP(scale) OP(scale_backward) OP(rotated_linear)                        \
  OP(rotated_linear_backward) OP(linear_from_skew) OP(linear_from_skew_backward)

// Names of the operators with a CUDA kernel: <name>_cuda is registered for each, if csrc/cuda was
// compiled.
#define BOFT_CUDA_OPS(OP)                                                                    \
  OP(cayley) OP(cayley_backward) OP(compose) OP(compose_backward) OP(stage_from_skew)        \
  OP(stage_from_skew_backward) OP(rotate) OP(rotate_indexed) OP(rotate_backward) OP(rotate_stage_grad)    \
  OP(segment_stage_grads) OP(scale) OP(scale_backward) OP(rotated_linear)                        \
  OP(rotated_linear_backward) OP(linear_from_skew) OP(linear_from_skew_backward)
