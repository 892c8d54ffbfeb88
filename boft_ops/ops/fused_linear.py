"""The rotated linear layer as one op, where a kernel does it all in one matrix product.

Everywhere else it is put together from other ops (linear.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._runtime import native
from .._runtime.backend import Kernel, Op
from .rotate import rotate_backward_reference, rotate_reference

MIN_ROWS = 64  # below, a BLAS reads the weight faster


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    stage: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    z = F.linear(rotate_reference(x, stage, stage.shape[-1], 1, False), weight)
    y = z.clone() if scale is None else z * scale
    return y if bias is None else y + bias, z if save else z.new_empty(0, len(weight))


def _linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stage: torch.Tensor,
    scale: torch.Tensor | None,
    z: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rotated_grad = (grad if scale is None else grad * scale) @ weight
    x_grad, gram = rotate_backward_reference(rotated_grad, x, stage, stage.shape[-1], 1, False, 1)
    scale_grad = grad.new_empty(0) if z is None else (grad * z).sum(0)
    return x_grad, gram[0], scale_grad, grad.sum(0)


def _fake_linear(x, weight, stage, scale, bias, save):
    rows, n = x.shape[0], weight.shape[0]  # len() would make a constant of symbolic rows
    return x.new_empty(rows, n), x.new_empty(rows if save else 0, n)


def _fake_linear_backward(grad, x, weight, stage, scale, z):
    n = len(weight)
    scale_grad = x.new_empty(0 if z is None else n)
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    return x_grad, torch.empty_like(stage), scale_grad, x.new_empty(n)


def _native_takes(x: torch.Tensor, weight: torch.Tensor, stage: torch.Tensor) -> bool:
    """Enough rows to make up for reading the weight more slowly than a BLAS does; float32 alone,
    with vector instructions that the BLAS has as well."""
    return (
        x.dtype == weight.dtype == stage.dtype == torch.float32
        and 192 % stage.shape[-1] == 0
        and x.shape[0] >= MIN_ROWS
        and native.isa in ("avx2", "avx512")
    )


# y = scale * (x R W^T) + bias in one product, for a stage of stride 1; z, if it is to be saved, is
# y before the scale and the bias. Where no kernel serves it, the layer is put together from others.
linear_forward = Op(
    "linear(Tensor x, Tensor weight, Tensor stage, Tensor? scale, Tensor? bias, bool save)"
    " -> (Tensor, Tensor)",
    reference=_linear,
    fake=_fake_linear,
    samples=lambda w: iter(()),
    kernels={"cpu": Kernel(lambda x, weight, stage, *_: _native_takes(x, weight, stage))},
)
# -> gradients of x, stage, scale (empty without z) and bias
linear_backward = Op(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor stage, Tensor? scale, Tensor? z)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_linear_backward,
    fake=_fake_linear_backward,
    samples=lambda w: iter(()),
    kernels={"cpu": Kernel(lambda grad, x, weight, stage, *_: _native_takes(x, weight, stage))},
)
