"""The rotated layer as a sequence of differentiable functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._runtime import autocast
from .._runtime.dtypes import HALVES
from .kaleidoscope import multiply
from .rotation import DenseRotation, Rotation, SkewRotation
from .scale import scale_columns, scale_of


def composed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    rotation: Rotation,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    side: str,
    kaleidoscope: int,
    as_torch: bool = False,
) -> torch.Tensor:
    """Compute the layer with functions that are differentiable any number of times.

    It serves what ``RotatedLinear`` has no closed form for: a trained weight, a weight that is no
    plain tensor, side "out", kaleidoscopes, transforms of torch.func, and gradients of gradients.
    The arguments are those of ``rotated_linear``.

    Args:
        as_torch: the rotation is the identity and the scale one, and the result has to equal
            ``F.linear(x, weight, bias)`` bit for bit in half precision, too.
    """
    blocks = rotation.blocks()
    if side == "in":
        x = multiply(x, blocks, kaleidoscope)
    if bias is not None and x.dtype in HALVES and (scale is not None or side == "out"):
        # The bias comes last, because z is rounded before it is scaled or rotated. Beside a large
        # bias that rounding would leave little of z, and a rotation would spread it.
        z = F.linear(x, weight)
        y = multiply(z, blocks, kaleidoscope, transpose=True) if side == "out" else z
        if as_torch:
            scaled = y if scale is None else scale_columns(y, scale)
            return F.linear(x, weight, bias) + (scaled - z)  # the difference is exactly 0
        return y + bias if scale is None else scale_columns(y, scale, None, bias)
    # The bias goes into the matrix product, where torch's linear has it, and what the scale and the
    # rotation then do to it is taken back below. Both corrections vanish exactly at the identity.
    y, shift = F.linear(x, weight, bias), bias
    if side == "out":
        y = multiply(y, blocks, kaleidoscope, transpose=True)
        if bias is not None:
            shift = multiply(bias, blocks, kaleidoscope, transpose=True)
    if scale is None:
        return y if side == "in" or bias is None else y + (bias - shift)
    return scale_columns(y, scale, shift, bias)


def differentiable_gradients(
    inputs: tuple[torch.Tensor | None, ...],
    method: str | None,
    grad: torch.Tensor,
    needs: tuple[bool, ...],
    scale_base: int = 0,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of ``RotatedLinear`` as functions of every input, for gradients of gradients.

    Args:
        inputs: x, weight, scale, bias, skew, drop_mask and matrix, as the Function got them.
        method: of the skew; None for a matrix.
        grad: the gradient of the rows (N, n).
        needs: the inputs whose gradients are wanted.
        scale_base: the number that the input ``scale`` is an offset from.
    """
    x, weight, scale, bias, skew, drop_mask, matrix = inputs
    wanted = [tensor for tensor, need in zip(inputs, needs, strict=False) if need]
    rotation = DenseRotation(matrix) if skew is None else SkewRotation(skew, method, drop_mask)
    with torch.enable_grad(), autocast.disabled(grad.device.type):
        scale = scale_of(scale, scale_base)
        y = composed_linear(x, weight, rotation, scale, bias, "in", 0).reshape(grad.shape)
        grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(grads) if need else None for need in needs)
