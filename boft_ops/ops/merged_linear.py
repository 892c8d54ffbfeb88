"""The layer as one product with the merged weight W' = diag(s) W R^T: y = x W'^T + bias.

With g = dL/dy, every gradient is a pass over rows that are there anyway:

- dL/dx = g W', in which scale and rotation are done already.
- R is orthogonal, so that dL/dR = (x^T dL/dx) R in each group: a Gram matrix, and no rotated rows.
  A butterfly of several stages takes the rows through them, one after another, as x R goes.
- z = s * (x R W^T), the output before the bias, gives dL/ds_j = sum_i g_ij z_ij / s_j. Rounding z
  costs the same part of it for every size of s_j, and a zero is replaced (``divisible``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .._runtime import autocast, internals
from .._runtime.dtypes import COMPUTE
from .composed_linear import differentiable_gradients
from .rotate import apply_stages, gradients_of_orthogonal_stages
from .scale import scale_backward
from .stage_from_skew import stages_from_skew, stages_from_skew_backward
from .stages import Stage

# In the place of a zero in a scale that is trained: outputs of this part of their size are far
# below the rounding of others, and dividing by it loses nothing. float16 has no such number.
LEAST_FACTOR = 2.0**-30
# Devices on which y serves as z: where no kernel writes into it without raising its version.
KEEP_OUTPUT = ("cpu",)


class MergedWeight(NamedTuple):
    """A merged weight, and what gradients of its rotation and scale need.

    Attributes:
        numbers: W' (n, d), without a gradient.
        scale: s (n,) in the compute dtype, without zeros, or None.
        blocks: (m, K, b, b) of R.
        matrices: (d/size, size, size) of each stage.
        stages: of the butterfly.
    """

    numbers: torch.Tensor
    scale: torch.Tensor | None
    blocks: torch.Tensor
    matrices: list[torch.Tensor]
    stages: tuple[Stage, ...]


def serves_training(dtype: torch.dtype, scale: torch.Tensor | None) -> bool:
    """Return True if ``merged_linear`` has the gradients in this dtype of the rows.

    Args:
        dtype: of the rows.
        scale: the scale if it is trained, else None.
    """
    return dtype != torch.float16 or scale is None


def divisible(scale: torch.Tensor) -> torch.Tensor:
    """The scale with ``LEAST_FACTOR`` in the place of zeros, found without waiting for a device."""
    return scale.masked_fill(scale == 0, LEAST_FACTOR)


def merged_with_rotation(
    weight: torch.Tensor,
    skew: torch.Tensor,
    scale: torch.Tensor | None,
    stages: tuple[Stage, ...],
    is_scale_trained: bool,
) -> MergedWeight:
    """Merge a rotation of the method "exact" and a scale into a weight, outside of autograd.

    Args:
        weight: W (n, d), in the dtype of the rows.
        skew: (m, K, b(b-1)/2).
        scale: s (n,) or None.
        stages: of the butterfly, see ``plan``.
        is_scale_trained: True replaces zeros of the scale, for the gradient of the scale.
    """
    weight, wide = weight.detach().contiguous(), COMPUTE[weight.dtype]
    blocks, matrices = stages_from_skew(skew.detach(), None, "exact", stages, weight.dtype)
    rotated = apply_stages(weight, matrices, stages, True)
    if scale is not None:
        scale = scale.detach().to(wide)
        scale = divisible(scale) if is_scale_trained else scale
        rotated.mul_(scale[:, None])  # in the wide dtype, and rounded once more
    return MergedWeight(rotated, scale, blocks, matrices, stages)


def merged_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    skew: torch.Tensor,
    scale_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    merged: MergedWeight,
) -> torch.Tensor:
    """``boft_linear`` with a weight in which skew and scale are merged already.

    Args:
        x: (..., d), in the dtype of ``merged.numbers``.
        weight, skew, bias: as for ``boft_linear``; gradients reach skew, scale_offset and bias.
        scale_offset: the scale minus one, (n,), or None.
        merged: what ``merged_with_rotation`` made of weight, skew and scale.

    Returns:
        (..., n) in the dtype of x.
    """
    y = _MergedLinear.apply(x, weight, scale_offset, bias, skew, merged)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[1])


class _MergedLinear(torch.autograd.Function):
    """y = x W'^T + bias with the gradients of x, skew, scale and bias.

    Saves x, W' and the rotation by reference. For a trained scale without a bias y is z: on a CPU
    the very y that its consumer keeps, with its version, which tells a change in place; z is then
    computed again. On a GPU z is a copy: fused kernels of other packages, such as Liger's SwiGLU,
    write gradients into their inputs, which raises no version. With a bias z is saved, as y rounds
    it beside a large bias, and the bias is added last.
    """

    @staticmethod
    def forward(ctx, x, weight, offset, bias, skew, merged):
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        need_scale = ctx.needs_input_grad[2]
        adds_bias = need_scale and bias is not None
        z = F.linear(rows, merged.numbers, None if adds_bias else bias)
        y = z + bias if adds_bias else z
        ctx.output = None
        if need_scale and not adds_bias:
            # hooks of saved tensors (checkpoints, offloading) get a tensor that nobody changes
            keeps = y.device.type in KEEP_OUTPUT and internals.saved_tensor_hooks(True) is None
            ctx.output = (y.detach(), y._version) if keeps else None
            z = None if keeps else y.clone()
        ctx.stages = merged.stages
        # a saved Parameter would show what has been put into its .data since
        own = (z, merged.scale) if need_scale else (None, None)
        ctx.vectors = offset, bias  # not saved: both may be changed in place before the backward
        rotation = merged.numbers, merged.blocks, *merged.matrices
        ctx.save_for_backward(x, weight.detach(), skew, *own, *rotation)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, skew, z, factor, numbers, blocks, *matrices = ctx.saved_tensors
        needs = need_x, _, need_scale, need_bias, need_skew, _ = ctx.needs_input_grad
        offset, bias = ctx.vectors
        if torch.is_grad_enabled():
            inputs = x, weight, offset, bias, skew, None, None
            return differentiable_gradients(inputs, "exact", grad, (*needs[:5], False), 1)
        rows, grad = x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), grad.contiguous()
        x_grad = skew_grad = scale_grad = bias_grad = None
        with autocast.disabled(grad.device.type):  # it may be on in backward alone
            if need_scale:
                if ctx.output is not None:
                    z, version = ctx.output
                    if z._version != version:
                        z = F.linear(rows, numbers)
                    if not internals.keeps_graph():
                        ctx.output = None
                _, products, bias_grad = scale_backward(grad, z, factor, None)
                scale_grad = (products / factor).to(offset.dtype)
            elif need_bias:
                bias_grad = grad.sum(0)
            if need_x or need_skew:
                x_grad = grad @ numbers
            if need_skew:
                operands = rows, x_grad, matrices, ctx.stages
                partials = gradients_of_orthogonal_stages(*operands)
                grads = skew.detach(), None, "exact", ctx.stages, blocks, partials
                skew_grad = stages_from_skew_backward(*grads)
        return (
            x_grad.reshape(x.shape) if need_x else None,
            None,
            scale_grad,
            bias_grad.to(bias.dtype) if need_bias else None,
            skew_grad,
            None,
        )
