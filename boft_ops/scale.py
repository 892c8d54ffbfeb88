"""Scale and shift of a layer's outputs: y = x * scale + shift, a number of each per column."""

from __future__ import annotations

import torch

from ._backend import Op


def _scale_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    scale_grad = torch.sum(grad * x, 0, dtype=wide).to(scale.dtype)
    shift_grad = torch.sum(grad, 0, dtype=wide).to(scale.dtype)
    return grad * scale, scale_grad, shift_grad


def _fake_scale_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    return x_grad, torch.empty_like(scale), torch.empty_like(scale)


scale_backward = Op(
    "scale_backward(Tensor grad, Tensor x, Tensor scale) -> (Tensor, Tensor, Tensor)",
    _scale_backward,
    _fake_scale_backward,
    supports={"cpu": lambda grad, *_: torch.finfo(grad.dtype).bits >= 32},
)


class Scale(torch.autograd.Function):
    """y = x * scale + shift of rows x. Saves x and scale; one pass gives all three gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale, shift):
        return x * scale if shift is None else torch.addcmul(shift, x, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, shift = inputs
        ctx.has_shift = shift is not None
        # x is as large as the output: kept only if the scale is trained
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale)

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        if x is None:
            shift_grad = grad.sum(0) if ctx.needs_input_grad[2] else None
            return grad * scale, None, shift_grad
        x_grad, scale_grad, shift_grad = scale_backward(grad.contiguous(), x, scale)
        return x_grad, scale_grad, shift_grad if ctx.has_shift else None


def scale_columns(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """x (..., n) * scale (n,) + shift (n,), all of one dtype."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return Scale.apply(rows, scale, shift).reshape(x.shape)
