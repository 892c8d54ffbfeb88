// The CPU kernels with their work divided among torch's threads: what several operators share. All
// pointers are to contiguous tensors.
#pragma once

#include "binding_checks.h"

namespace boft::binding {

// stage_from_skew and its gradient, which takes one part; see boft_kernels.h for the arguments.
void make_stage(const Butterfly& shape, const void* skew, const bool* drop, void* blocks,
                void* stages, boft::DType dtype);
void make_stage_backward(const Butterfly& shape, const void* blocks, const bool* drop,
                         const void* grad, void* blocks_grad, void* skew_grad, boft::DType dtype);

// boft::cpu::rotate and rotate_backward for all rows, and scale and scale_backward.
void rotate_rows(const void* x, const void* stages, const void* factor, void* y, int64_t rows,
                 int64_t d, boft::Stage stage, boft::DType dtype);
void rotate_rows_backward(const void* grad, const void* x, const void* stages, void* x_grad,
                          void* stages_grad, int64_t rows, int64_t d, boft::Stage stage,
                          bool transpose, boft::DType dtype);
void scale_rows(const void* x, const void* scale, const void* shift, void* y, int64_t rows,
                int64_t n, boft::DType dtype);
void scale_rows_backward(const void* grad, const void* x, const void* scale, const void* center,
                         void* x_grad, void* scale_grad, void* bias_grad, int64_t rows, int64_t n,
                         boft::DType dtype);

}  // namespace boft::binding
