"""The rotated linear layer as one op, for one stage whose chunks are neighbors.

On a CPU one C++ kernel rotates the rows inside the matrix product. On a GPU no kernel is fused:
the op makes the launches of rotate, linear and scale in one call, because Python takes longer to
make them one by one than a GPU takes to run them, at any but the largest sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .._runtime import autocast, native
from .._runtime.backend import Kernel, Op
from .._runtime.dtypes import COMPUTE, HALVES, widest
from .._runtime.limits import FUSED_MULTIPLE, MAX_STAGE
from .._runtime.tuned import ShapeClass
from .._runtime.workload import Workload
from .composed_linear import differentiable_gradients
from .rotate import (
    apply_stages,
    apply_stages_backward,
    flops_of_rotate,
    rotate_backward,
    rotate_rows,
)
from .rotated_linear_parts import batch
from .scale import Scale, scale_backward, scale_forward
from .stage_from_skew import stages_from_skew, stages_from_skew_backward
from .stages import Stage, plan

MIN_ROWS = 32  # with fewer rows a BLAS reads the weight faster than the fused C++ kernel
MAX_CUDA_SIZE = 64  # features of a group; Triton's rotate is faster for larger ones


rotated_linear_reference, rotated_linear_backward_reference = batch(
    *(op.reference for op in (rotate_rows, rotate_backward, scale_forward, scale_backward))
)


def _triton_launches() -> tuple[Callable, Callable]:
    """Return the op and its backward made of launches of Triton's kernels in measured tiles."""
    return batch(
        *(op.launch for op in (rotate_rows, rotate_backward, scale_forward, scale_backward))
    )


def _fake(x, weight, stage, scale, bias, bias_in_z, save):
    rows, n = x.shape[0], weight.shape[0]  # len() would make a constant of symbolic rows
    return x.new_empty(rows, n), x.new_empty(rows if save and scale is not None else 0, n)


def _fake_backward(grad, x, weight, stage, scale, center, z, splits, need_bias):
    n = weight.shape[0]
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    stage_grad = stage.new_empty(splits, *stage.shape, dtype=COMPUTE[x.dtype])
    if z is not None:
        return x_grad, stage_grad, scale.new_empty(n), scale.new_empty(n)
    return x_grad, stage_grad, stage.new_empty(0), grad.new_empty(n if need_bias else 0)


def _cpu_supports(x, weight, stage, scale=None, bias=None, bias_in_z=True, save=False) -> bool:
    """Float32 with enough rows, on a CPU with the vector instructions that its BLAS uses too."""
    return (
        x.dtype == weight.dtype == stage.dtype == torch.float32
        and FUSED_MULTIPLE % stage.shape[-1] == 0
        and x.shape[0] >= MIN_ROWS
        and native.isa in ("avx2", "avx512")
    )


def _cpu_supports_backward(grad, x, weight, stage, scale, center, z, splits, need_bias) -> bool:
    return splits == 1 and _cpu_supports(x, weight, stage)


def _cuda_supports(x, weight, stage, scale=None, bias=None, bias_in_z=True, save=False) -> bool:
    half = x.dtype in HALVES and x.dtype == weight.dtype
    small = stage.dtype == torch.float32 and stage.shape[-1] <= MAX_CUDA_SIZE
    return half and small and (bias is None or bias_in_z or scale is not None)


def _cuda_supports_backward(grad, x, weight, stage, scale, center, z, splits, need_bias) -> bool:
    return (z is not None or not need_bias) and _cuda_supports(x, weight, stage)


def _triton_supports(x, weight, stage, *_: object) -> bool:
    return stage.shape[-1] <= MAX_STAGE


def _triton_supports_backward(grad, x, weight, stage, *_: object) -> bool:
    return stage.shape[-1] <= MAX_STAGE


def _samples(w: Workload) -> Iterator[tuple]:
    size = plan(w.n_factors, w.block_size, w.device.type)[0].size
    weight = w.tensor(w.n, w.d, std=w.d**-0.5)
    scale = 1 + w.tensor(w.n, std=0.1, dtype=w.compute_dtype)
    bias, in_z = w.tensor(w.n, salt=1), w.dtype not in HALVES
    yield w.x(), weight, w.matrices(w.d // size, size), scale, bias, in_z, True


def _backward_samples(w: Workload) -> Iterator[tuple]:
    stage = plan(w.n_factors, w.block_size, w.device.type)[0]
    for x, weight, matrix, scale, bias, in_z, _ in _samples(w):
        grad, z = (w.tensor(w.rows, w.n, salt=salt) for salt in (1, 2))
        yield grad, x, weight, matrix, scale, bias if in_z else None, z, stage.splits(x), True


def _flops(x: torch.Tensor, weight: torch.Tensor, stage: torch.Tensor, *_: object) -> int:
    return 2 * x.numel() * weight.shape[0] + flops_of_rotate(x, stage)


_CLASS = ShapeClass(
    ("size",),
    ("rows", "inputs", "outputs"),
    lambda x, weight, stage, *_: ((stage.shape[-1],), (*x.shape, weight.shape[0])),
)
# y = scale * x R W^T + bias, for one stage of stride 1.
#   x (rows, d); weight (n, d); stage (d/size, size, size); scale, bias (n,)
#   bias_in_z: add the bias inside the matrix product, as torch's linear does; the scale then leaves
#     it out: y = scale * (z - bias) + bias. With scale 1 y is exactly z. Not for half precision
#     with a scale: beside a large bias, z would be rounded to little of what the scale is for.
# Returns y (rows, n) and z (rows, n), the output before the scale: x R W^T, plus the bias if
# bias_in_z. z is empty, (0, n), unless `save` is true and there is a scale.
rotated_linear_forward = Op(
    "rotated_linear(Tensor x, Tensor weight, Tensor stage, Tensor? scale, Tensor? bias,"
    " bool bias_in_z, bool save) -> (Tensor, Tensor)",
    reference=rotated_linear_reference,
    fake=_fake,
    samples=_samples,
    kernels={
        "cpu": Kernel(_cpu_supports),
        "cuda": Kernel(_cuda_supports),
        "triton": Kernel(_triton_supports, lambda: _triton_launches()[0]),
    },
    shape_class=_CLASS,
    flops=_flops,
)
# The gradients of x, stage, scale and bias.
#   center: the bias if z holds it, else None
#   z: as the forward op returned it; None if the scale needs no gradient
#   splits: the number of partial sums of the gradient of stage; 1 on a CPU
#   need_bias: sum up the gradient of the bias; with z it costs nothing and comes in any case
# Returns x_grad (rows, d), stage_grad (splits, d/size, size, size) in at least float32, scale_grad
# (n,), empty without z, and bias_grad (n,), empty without z unless need_bias.
rotated_linear_backward = Op(
    "rotated_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor stage, Tensor? scale,"
    " Tensor? center, Tensor? z, int splits, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=rotated_linear_backward_reference,
    fake=_fake_backward,
    samples=_backward_samples,
    kernels={
        "cpu": Kernel(_cpu_supports_backward),
        "cuda": Kernel(_cuda_supports_backward),
        "triton": Kernel(_triton_supports_backward, lambda: _triton_launches()[1]),
    },
    shape_class=_CLASS._replace(of=lambda grad, *args: _CLASS.of(*args)),
    measured_as=rotated_linear_forward,
    comparable=lambda result: (result[0], result[1].sum(0), *result[2:]),
    flops=lambda grad, x, weight, stage, *_: _flops(x, weight, stage) + flops_of_rotate(x, stage),
)


# --- The Function of a layer ----------------------------------------------------------------------


class Layer(NamedTuple):
    """The operands of one call."""

    rows: torch.Tensor  # (N, d)
    weight: torch.Tensor  # (n, d), frozen
    scale: torch.Tensor | None  # (n,) in the compute dtype
    bias: torch.Tensor | None  # (n,); in backward only if z, the output before the scale, holds it
    matrices: list[torch.Tensor]  # (d/size, size, size) of each stage
    stages: tuple[Stage, ...]


class Needs(NamedTuple):
    """The gradients that backward has to compute."""

    x: bool
    rotation: bool
    scale: bool
    bias: bool


# x_grad, the partial sums of each stage's gradient, scale_grad and bias_grad
_Gradients = tuple[torch.Tensor | None, list, torch.Tensor | None, torch.Tensor | None]


def _forward(layer: Layer, strategy: str, save_z: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y (N, n) and z, the output before the scale; z means something only if it is saved.

    The bias is added inside the product, as in torch's linear, so that y is exactly torch's where R
    is the identity and the scale one. In half precision the scale adds it last, and z is without
    it. The strategy "identity" is for the latter where y has to be torch's.
    """
    rows, weight, scale, bias, matrices, stages = layer
    if strategy == "identity":
        y = F.linear(rows, weight, bias)
        return y, F.linear(rows, weight) if save_z else y
    if strategy == "fused":
        inner = _outer_stages(rows, matrices, stages)
        return rotated_linear_forward(inner, weight, matrices[0], scale, bias, True, save_z)
    center = None if scale is not None and rows.dtype in HALVES else bias
    if strategy == "batched":
        in_z = center is bias
        return rotated_linear_forward(rows, weight, matrices[0], scale, bias, in_z, save_z)
    z = F.linear(apply_stages(rows, matrices, stages, False), weight, center)
    return z if scale is None else Scale.forward(z, scale, center, bias), z


def _outer_stages(
    rows: torch.Tensor, matrices: list[torch.Tensor], stages: tuple[Stage, ...]
) -> torch.Tensor:
    """Return the rows after every stage but the first: it comes last, inside the fused kernel."""
    if len(stages) == 1:
        return rows
    return apply_stages(rows, matrices[1:], stages[1:], False)


def _backward_fused(
    layer: Layer, grad: torch.Tensor, z: torch.Tensor | None, needs: Needs
) -> _Gradients:
    rows, weight, scale, center, matrices, stages = layer
    inner = _outer_stages(rows, matrices, stages)
    inner_grad, first, scale_grad, bias_grad = rotated_linear_backward(
        grad, inner, weight, matrices[0], scale, center, z, 1, needs.bias
    )
    if len(stages) == 1:
        return inner_grad, [first], scale_grad, bias_grad
    saved = rows if needs.rotation else None
    x_grad, others = apply_stages_backward(
        inner_grad, saved, matrices[1:], stages[1:], False, needs.x
    )
    return x_grad, [first, *others], scale_grad, bias_grad


def _backward_batched(
    layer: Layer, grad: torch.Tensor, z: torch.Tensor | None, needs: Needs
) -> _Gradients:
    """The gradients where both x and the rotation need one: one call computes the two together."""
    rows, weight, scale, center, matrices, stages = layer
    splits = stages[0].splits(rows)
    with autocast.disabled(grad.device.type):  # it may be on in backward alone
        x_grad, partials, scale_grad, bias_grad = rotated_linear_backward(
            grad, rows, weight, matrices[0], scale, center, z, splits, False
        )
    if z is None and needs.bias:
        bias_grad = grad.sum(0)
    return x_grad, [partials], scale_grad, bias_grad


def _backward_separate(
    layer: Layer, grad: torch.Tensor, z: torch.Tensor | None, needs: Needs
) -> _Gradients:
    rows, weight, _, _, matrices, stages = layer
    grad, scale_grad, bias_grad = _backward_scale(layer, grad, z, needs)
    if not (needs.x or needs.rotation):
        return None, [], scale_grad, bias_grad
    with autocast.disabled(grad.device.type):
        rows_grad = grad @ weight
    saved = rows if needs.rotation else None
    x_grad, partials = apply_stages_backward(rows_grad, saved, matrices, stages, False, needs.x)
    return x_grad, partials, scale_grad, bias_grad


def _backward_scale(
    layer: Layer, grad: torch.Tensor, z: torch.Tensor | None, needs: Needs
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradient of z, the output before the scale, and those of the scale and bias."""
    scale, center = layer.scale, layer.bias
    if needs.scale:
        return scale_backward(grad, z, scale, None if center is None else _as(center, scale.dtype))
    bias_grad = grad.sum(0) if needs.bias else None
    if scale is not None:
        grad = Scale.forward(grad, scale, None, None)
    return grad, None, bias_grad


class RotatedLinear(torch.autograd.Function):
    """y = scale * (x R W^T) + bias with a frozen W: every gradient in closed form.

    R comes as skew and drop_mask or as matrix; what it does not come as is None. ``decided`` is the
    method of the skew (None for a matrix), the stages and the strategy, see linear.py.
    Returns rows (N, n), whatever the shape of x: a Function that returned a view of them would
    forbid changing its output in place.
    Saves x, the blocks, the stage matrices and, for a trained scale alone, the output before it.
    """

    @staticmethod
    def forward(ctx, x, weight, scale, bias, skew, drop_mask, matrix, decided):
        method, stages, strategy = ctx.decided = decided
        if skew is None:
            blocks, matrices = None, [_as(_detached(matrix), widest(x.dtype, matrix.dtype))]
        else:
            blocks, matrices = stages_from_skew(skew, drop_mask, method, stages, x.dtype)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        wide_scale = None if scale is None else _detached(scale)
        if scale is not None and scale.dtype != COMPUTE[x.dtype]:
            wide_scale = wide_scale.to(COMPUTE[x.dtype])
        layer = Layer(rows, weight, wide_scale, bias, matrices, stages)
        save_z = scale is not None and ctx.needs_input_grad[2]
        y, z = _forward(layer, strategy, save_z)
        # A gradient of this call needs the numbers of this call. A saved Parameter would show what
        # has been put into its .data since, a detached tensor keeps the memory that it had.
        inputs = x, weight.detach(), scale, bias, skew, drop_mask, matrix
        in_z = save_z and bias is not None and x.dtype not in HALVES
        center = bias.detach() if in_z else None
        values = skew.detach() if method == "neumann5" else None
        own = z if save_z else None, wide_scale, center, values, blocks
        ctx.save_for_backward(*inputs, *own, *matrices)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale, bias, skew, drop_mask, matrix, *own = ctx.saved_tensors
        z, wide_scale, center, values, blocks, *matrices = own
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs, needs = ctx.saved_tensors[:7], ctx.needs_input_grad
            return differentiable_gradients(inputs, ctx.decided[0], grad, needs)
        need_x, _, need_scale, need_bias, need_skew, _, need_matrix, _ = ctx.needs_input_grad
        need_rotation = need_skew or need_matrix
        method, stages, strategy = ctx.decided
        if strategy == "fused":
            backward = _backward_fused
        elif strategy == "batched" and need_x and need_rotation:
            backward = _backward_batched
        else:
            backward = _backward_separate
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        layer = Layer(rows, weight, wide_scale, center, matrices, stages)
        needs = Needs(need_x, need_rotation, need_scale, need_bias)
        x_grad, partials, scale_grad, bias_grad = backward(layer, grad.contiguous(), z, needs)
        skew_grad = matrix_grad = None
        if need_skew:
            skew = skew if values is None else values
            skew_grad = stages_from_skew_backward(skew, drop_mask, method, stages, blocks, partials)
        elif need_matrix:
            matrix_grad = _as(partials[0].sum(0), matrix.dtype)
        if need_x and x.dim() != 2:
            x_grad = x_grad.reshape(x.shape)
        return (
            x_grad if need_x else None,
            None,
            _as(scale_grad, scale.dtype) if need_scale else None,
            _as(bias_grad, bias.dtype) if need_bias else None,
            skew_grad,
            None,
            matrix_grad,
            None,
        )


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its Parameter; as it is in an exported graph, which is differentiated."""
    return tensor if torch.compiler.is_exporting() else tensor.detach()


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in a dtype; comparing is faster than a call of .to() that does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
