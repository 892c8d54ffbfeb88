"""A rotated layer as its launches one after the other, and torch's products between them."""

import torch
import torch.nn.functional as F

from .rotate import rotate, rotate_backward
from .scale import scale as scale_rows
from .scale import scale_backward


def rotate_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    stage: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, d), weight (n, d), a stage of stride 1, vectors (n,) -> y and, if it is to be saved, z.

    z = x R W^T + bias and y = scale * (z - bias) + bias; checked by the caller.
    """
    z = F.linear(rotate(x, stage, stage.shape[-1], 1, False), weight, bias)
    if scale is None:
        return z, z.new_empty(0, z.shape[1])
    y = scale_rows(z, scale, bias, bias)
    return y, z if save else z.new_empty(0, z.shape[1])


def rotate_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stage: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    splits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, of the stage as partial sums and, empty without z, of scale and bias."""
    if z is not None:
        grad, scale_grad, bias_grad = scale_backward(grad, z, scale, bias)
    else:
        scale_grad, bias_grad = stage.new_empty(0), stage.new_empty(0)
        if scale is not None:
            grad = scale_rows(grad, scale, None, None)
    size = stage.shape[-1]
    x_grad, partials = rotate_backward(grad @ weight, x, stage, size, 1, False, splits)
    return x_grad, partials, scale_grad, bias_grad
