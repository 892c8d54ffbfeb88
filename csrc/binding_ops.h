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
std::tuple<Tensor, Tensor> rotation_cpu(const Tensor& skew, const MaybeTensor& drop);
Tensor rotation_backward_cpu(const Tensor& blocks, const MaybeTensor& drop, const Tensor& grad);
Tensor rotate_cpu(const Tensor& x, const Tensor& stage, int64_t chunk, int64_t stride,
                  bool transpose);
Tensor rotate_indexed_cpu(const Tensor& x, const Tensor& stages, const Tensor& index, int64_t chunk,
                          int64_t stride, bool transpose);
std::tuple<Tensor, Tensor> rotate_backward_cpu(const Tensor& grad, const Tensor& x,
                                               const Tensor& stage, int64_t chunk, int64_t stride,
                                               bool transpose, int64_t splits);
Tensor gram_cpu(const Tensor& x, const Tensor& grad, int64_t size, int64_t chunk, int64_t stride,
                int64_t splits);
Tensor scale_cpu(const Tensor& x, const Tensor& scale, const MaybeTensor& center,
                 const MaybeTensor& bias);
std::tuple<Tensor, Tensor, Tensor> scale_backward_cpu(const Tensor& grad, const Tensor& x,
                                                      const Tensor& scale,
                                                      const MaybeTensor& center);
std::tuple<Tensor, Tensor> linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& stage,
                                      const MaybeTensor& scale, const MaybeTensor& bias, bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& stage,
    const MaybeTensor& scale, const MaybeTensor& z);

Tensor cayley_cuda(const Tensor& skew, const MaybeTensor& drop);
Tensor cayley_backward_cuda(const Tensor& blocks, const MaybeTensor& drop, const Tensor& grad);
Tensor compose_cuda(const Tensor& factors, int64_t first);
Tensor compose_backward_cuda(const Tensor& factors, const Tensor& grad, int64_t first);
std::tuple<Tensor, Tensor> rotation_cuda(const Tensor& skew, const MaybeTensor& drop);
Tensor rotation_backward_cuda(const Tensor& blocks, const MaybeTensor& drop, const Tensor& grad);
Tensor rotate_cuda(const Tensor& x, const Tensor& stage, int64_t chunk, int64_t stride,
                   bool transpose);
Tensor rotate_indexed_cuda(const Tensor& x, const Tensor& stages, const Tensor& index,
                           int64_t chunk, int64_t stride, bool transpose);
std::tuple<Tensor, Tensor> rotate_backward_cuda(const Tensor& grad, const Tensor& x,
                                                const Tensor& stage, int64_t chunk, int64_t stride,
                                                bool transpose, int64_t splits);
Tensor gram_cuda(const Tensor& x, const Tensor& grad, int64_t size, int64_t chunk, int64_t stride,
                 int64_t splits);
Tensor scale_cuda(const Tensor& x, const Tensor& scale, const MaybeTensor& center,
                  const MaybeTensor& bias);
std::tuple<Tensor, Tensor, Tensor> scale_backward_cuda(const Tensor& grad, const Tensor& x,
                                                       const Tensor& scale,
                                                       const MaybeTensor& center);
std::tuple<Tensor, Tensor> rotate_linear_cuda(const Tensor& x, const Tensor& weight,
                                              const Tensor& stage, const MaybeTensor& scale,
                                              const MaybeTensor& bias, bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor> rotate_linear_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& stage,
    const MaybeTensor& scale, const MaybeTensor& bias, const MaybeTensor& z, int64_t splits);

}  // namespace boft::binding

// Names of the operators with a CPU kernel: <name>_cpu is registered for each.
#define BOFT_CPU_OPS(OP)                                                                       \
  OP(cayley) OP(cayley_backward) OP(compose) OP(compose_backward) OP(rotation)                 \
  OP(rotation_backward) OP(rotate) OP(rotate_indexed) OP(rotate_backward) OP(gram) OP(scale)   \
  OP(scale_backward) OP(linear) OP(linear_backward)

// Names of the operators with a CUDA kernel: <name>_cuda is registered for each, if csrc/cuda was
// compiled.
#define BOFT_CUDA_OPS(OP)                                                        \
  OP(cayley) OP(cayley_backward) OP(compose) OP(compose_backward) OP(rotation)   \
  OP(rotation_backward) OP(rotate) OP(rotate_indexed) \
  OP(rotate_backward) OP(gram) OP(scale) OP(scale_backward) OP(rotate_linear)    \
  OP(rotate_linear_backward)
