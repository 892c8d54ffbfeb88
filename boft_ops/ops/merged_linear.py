"""The layer as one product with the merged weight W' = diag(s) W R^T: y = x W'^T + bias.

W meets rotation and scale in one pass, and no other pass over the outputs is made than theirs:

- dL/dx = g W', with g = dL/dy: scale and rotation are done already.
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
from .._runtime.dtypes import COMPUTE, widest
from .composed_linear import differentiable_gradients
from .linear_from_skew import KEEP_OUTPUT
from .rotate import apply_stages, gradients_of_orthogonal_stages
from .rotation import DenseRotation, Rotation
from .scale import scale_backward
from .stage_from_skew import stages_from_skew, stages_from_skew_backward
from .stages import Stage

# In the place of a zero in a scale that is trained: outputs of this part of their size are far
# below the rounding of others, and dividing by it loses nothing. float16 has no such number.
LEAST_FACTOR = 2.0**-30


class MergedWeight(NamedTuple):
    """A merged weight, and what gradients of its rotation and scale need.

    Attributes:
        numbers: W' (n, d), without a gradient.
        scale: s (n,) in the compute dtype, without zeros if it is trained, or None.
        blocks: (m, K, b, b) of R; None if R was given as a matrix.
        matrices: (d/size, size, size) of each stage.
        stages: of the butterfly.
    """

    numbers: torch.Tensor
    scale: torch.Tensor | None
    blocks: torch.Tensor | None
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


@torch.no_grad()  # operators run their references where gradients of gradients may be needed
def merged_with_rotation(
    weight: torch.Tensor,
    rotation: Rotation,
    scale: torch.Tensor | None,
    stages: tuple[Stage, ...],
    is_scale_trained: bool,
) -> MergedWeight:
    """Merge an orthogonal rotation and a scale into a weight, outside of autograd.

    Args:
        weight: W (n, d), in the dtype of the rows.
        rotation: R, which has to be orthogonal.
        scale: s (n,) or None.
        stages: of the butterfly, see ``plan``.
        is_scale_trained: True replaces zeros of the scale, for the gradient of the scale.
    """
    weight = weight.detach().contiguous()
    if isinstance(rotation, DenseRotation):
        matrix, blocks = rotation.matrix.detach(), None
        matrices = [matrix.to(widest(weight.dtype, matrix.dtype))]
    else:
        skew, method, drop_mask = rotation
        operands = skew.detach(), drop_mask, method, stages, weight.dtype
        blocks, matrices = stages_from_skew(*operands)
    if scale is not None:
        scale = scale.detach().to(COMPUTE[weight.dtype])
        scale = divisible(scale) if is_scale_trained else scale
    numbers = apply_stages(weight, matrices, stages, True, scale)
    return MergedWeight(numbers, scale, blocks, matrices, stages)


def merged_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    rotation: Rotation,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    merged: MergedWeight,
    *,
    scale_base: int = 0,
    keeps: bool = False,
) -> torch.Tensor:
    """``boft_linear`` with a weight in which rotation and scale are merged already.

    Args:
        x: (..., d), in the dtype of ``merged.numbers``.
        weight, rotation, bias: as for ``rotated_linear``; gradients reach the rotation, the scale
            and the bias.
        scale: (n,), to which ``scale_base`` is added, or None.
        merged: what ``merged_with_rotation`` made of weight, rotation and scale.
        keeps: True to save the merged weight for the backward pass, for a caller who keeps it
            anyway; False to make it again there, since it is as large as the weight.

    Returns:
        (..., n) in the dtype of x.
    """
    skew = drop_mask = matrix = None
    if isinstance(rotation, DenseRotation):
        matrix = rotation.matrix
    else:
        skew, _, drop_mask = rotation
    decided = merged, scale_base, keeps
    y = _MergedLinear.apply(x, weight, scale, bias, skew, drop_mask, matrix, decided)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[1])


class _MergedLinear(torch.autograd.Function):
    """y = x W'^T + bias with the gradients of x, scale, bias and skew or matrix.

    Saves x and the rotation by reference. For a trained scale without a bias y is z: on a CPU the
    very y that its consumer keeps, with its version, which tells a change in place; z is then
    computed again. On a GPU z is a copy: fused kernels of other packages, such as Liger's SwiGLU,
    write gradients into their inputs, which raises no version. With a bias z is saved, as y rounds
    it beside a large bias, and the bias is added last.
    """

    @staticmethod
    def forward(ctx, x, weight, scale, bias, skew, drop_mask, matrix, decided):
        merged, ctx.scale_base, keeps = decided
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        need_scale = ctx.needs_input_grad[2]
        adds_bias = need_scale and bias is not None
        z = F.linear(rows, merged.numbers, None if adds_bias else bias)
        y = z + bias if adds_bias else z
        ctx.output = None
        if need_scale and not adds_bias:
            # hooks of saved tensors (checkpoints, offloading) get a tensor that nobody changes
            keeps_output = (
                y.device.type in KEEP_OUTPUT and internals.saved_tensor_hooks(True) is None
            )
            ctx.output = (y.detach(), y._version) if keeps_output else None
            z = None if keeps_output else y.clone()
        ctx.stages = merged.stages
        ctx.vectors = scale, bias  # not saved: both may be changed in place before the backward
        # a saved Parameter would show what has been put into its .data since
        given = x, weight.detach(), skew, drop_mask, matrix
        own = z if need_scale else None, merged.numbers if keeps else None, merged.scale
        ctx.save_for_backward(*given, *own, merged.blocks, *merged.matrices)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, skew, drop_mask, matrix, z, numbers, factor, *rest = ctx.saved_tensors
        blocks, *matrices = rest
        needs = need_x, _, need_scale, need_bias, need_skew, _, need_matrix, _ = (
            ctx.needs_input_grad
        )
        scale, bias = ctx.vectors
        method = None if skew is None else "exact"
        if torch.is_grad_enabled():
            inputs = x, weight, scale, bias, skew, drop_mask, matrix
            grads = differentiable_gradients(inputs, method, grad, needs[:7], ctx.scale_base)
            return *grads, None
        rows, grad = x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), grad.contiguous()
        x_grad = skew_grad = scale_grad = bias_grad = matrix_grad = None
        need_rotation = need_skew or need_matrix
        changed = need_scale and ctx.output is not None and ctx.output[0]._version != ctx.output[1]
        if numbers is None and (need_x or need_rotation or changed):
            numbers = apply_stages(weight.contiguous(), matrices, ctx.stages, True, factor)
        with autocast.disabled(grad.device.type):  # it may be on in backward alone
            if need_scale:
                if ctx.output is not None:
                    z = F.linear(rows, numbers) if changed else ctx.output[0]
                    if not internals.keeps_graph():
                        ctx.output = None
                _, products, bias_grad = scale_backward(grad, z, None, None)
                scale_grad = (products / factor).to(scale.dtype)
            elif need_bias:
                bias_grad = grad.sum(0)
            if need_x or need_rotation:
                x_grad = grad @ numbers
            if need_rotation:
                operands = rows, x_grad, matrices, ctx.stages
                partials = gradients_of_orthogonal_stages(*operands)
                if need_matrix:
                    matrix_grad = partials[0].sum(0).to(matrix.dtype)
                else:
                    grads = skew.detach(), drop_mask, method, ctx.stages, blocks, partials
                    skew_grad = stages_from_skew_backward(*grads)
        return (
            x_grad.reshape(x.shape) if need_x else None,
            None,
            scale_grad,
            bias_grad.to(bias.dtype) if need_bias else None,
            skew_grad,
            None,
            matrix_grad,
            None,
        )
