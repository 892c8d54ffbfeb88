"""The rotated layer as a sequence of differentiable functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .kaleidoscope import multiply
from .rotation import Rotation
from .scale import scale_columns


def composed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    rotation: Rotation,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    side: str,
    kaleidoscope: int,
) -> torch.Tensor:
    """Compute the layer with functions that are differentiable any number of times.

    It serves what ``RotatedLinear`` has no closed form for: a trained weight, side "out",
    kaleidoscopes, transforms of torch.func, and gradients of gradients. The arguments are those of
    ``rotated_linear``.
    """
    blocks = rotation.blocks()
    if side == "in":
        x = multiply(x, blocks, kaleidoscope)
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
