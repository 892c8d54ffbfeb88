"""Rows times the stages of a butterfly: the only op that touches the activations.

``rotate`` multiplies each row by one block-diagonal stage; ``rotate_backward`` gives both of its
gradients in one pass over the rows, ``gram`` that of the stage alone. All see x (N, d) as N rows of
H x M x L chunks of r features, and a stage matrix of group (h, l) mixes the M chunks that lie L
apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._backend import Op
from .plan import Stage
from .rotate_pair import op_of


def _groups(x: torch.Tensor, size: int, chunk: int, stride: int) -> torch.Tensor:
    """(N, d) -> (d/size, N, size); a view where the chunks of a group are neighbours."""
    n, d = x.shape
    if stride == 1:
        return x.reshape(n, d // size, size).transpose(0, 1)
    runs = x.reshape(n, d // (size * stride), size // chunk, stride, chunk)
    return runs.permute(1, 3, 0, 2, 4).reshape(d // size, n, size)


def _ungroup(groups: torch.Tensor, chunk: int, stride: int) -> torch.Tensor:
    """Inverse of ``_groups``."""
    n_groups, n, size = groups.shape
    if stride == 1:
        return groups.transpose(0, 1).reshape(n, n_groups * size)
    runs = groups.reshape(n_groups // stride, stride, n, size // chunk, chunk)
    return runs.permute(2, 0, 3, 1, 4).reshape(n, n_groups * size)


def _rotate(
    x: torch.Tensor, stage: torch.Tensor, chunk: int, stride: int, transpose: bool
) -> torch.Tensor:
    size = stage.shape[-1]
    groups = _groups(x, size, chunk, stride)
    if torch.finfo(x.dtype).bits < 32:
        # y = x + x (R - I): rounding R itself to 8 or 11 bits would swamp a small rotation
        stage = stage - torch.eye(size, dtype=stage.dtype, device=stage.device)
    stage = (stage.mT if transpose else stage).to(x.dtype)
    if torch.finfo(x.dtype).bits < 32:
        return _ungroup(torch.baddbmm(groups, groups, stage), chunk, stride)
    return _ungroup(torch.bmm(groups, stage), chunk, stride)


def _gram(
    x: torch.Tensor, grad: torch.Tensor, size: int, chunk: int, stride: int, splits: int
) -> torch.Tensor:
    left = _groups(x, size, chunk, stride)
    right = _groups(grad, size, chunk, stride)
    product = torch.bmm(left.mT, right)[None]
    product = product.to(torch.promote_types(x.dtype, torch.float32))
    # the whole sum in the first part: kernels divide it, one part for each share of the rows
    return torch.cat([product, product.new_zeros(splits - 1, *product.shape[1:])])


def _rotate_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    stage: torch.Tensor,
    chunk: int,
    stride: int,
    transpose: bool,
    splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    pair = (grad, x) if transpose else (x, grad)
    gram = _gram(*pair, stage.shape[-1], chunk, stride, splits)
    return _rotate(grad, stage, chunk, stride, not transpose), gram


def _fake_rotate(
    x: torch.Tensor, stage: torch.Tensor, chunk: int, stride: int, transpose: bool
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_gram(
    x: torch.Tensor, grad: torch.Tensor, size: int, chunk: int, stride: int, splits: int
) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(splits, x.shape[1] // size, size, size, dtype=dtype)


def _fake_rotate_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    stage: torch.Tensor,
    chunk: int,
    stride: int,
    transpose: bool,
    splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    return x_grad, _fake_gram(x, grad, stage.shape[-1], chunk, stride, splits)


MAX_TRITON_SIZE = 256  # of a group, for CUDA C++ too; the plan makes no larger ones on a GPU


def _native_takes(x: torch.Tensor, size: int, splits: int = 1) -> bool:
    """Up to the size from which BLAS wins."""
    return x.dtype != torch.float16 and size <= 128 and splits == 1


def _cuda_takes_stage(x: torch.Tensor, stage: torch.Tensor) -> bool:
    wide = torch.promote_types(x.dtype, torch.float32)
    return stage.dtype == wide and stage.shape[-1] <= MAX_TRITON_SIZE


def _native_takes_stage(x: torch.Tensor, stage: torch.Tensor, splits: int = 1) -> bool:
    wide = torch.promote_types(x.dtype, torch.float32)
    return stage.dtype == wide and _native_takes(x, stage.shape[-1], splits)


rotate_rows = Op(
    "rotate(Tensor x, Tensor stage, int chunk, int stride, bool transpose) -> Tensor",
    _rotate,
    _fake_rotate,
    triton="rotate:rotate",
    supports={
        "cpu": lambda x, stage, *_: _native_takes_stage(x, stage),
        "cuda": lambda x, stage, *_: _cuda_takes_stage(x, stage),
        "triton": lambda x, stage, *_: stage.shape[-1] <= MAX_TRITON_SIZE,
    },
)
rotate_pair = op_of(_rotate)
# Gradients of a stage come as partial sums (splits, d/size, size, size), in at least float32.
gram = Op(
    "gram(Tensor x, Tensor grad, int size, int chunk, int stride, int splits) -> Tensor",
    _gram,
    _fake_gram,
    triton="rotate_backward:gram",
    supports={
        "cpu": lambda x, grad, size, chunk, stride, splits: _native_takes(x, size, splits),
        "cuda": lambda x, grad, size, *_: size <= MAX_TRITON_SIZE,
        "triton": lambda x, grad, size, *_: size <= MAX_TRITON_SIZE,
    },
)
rotate_backward = Op(
    "rotate_backward(Tensor grad, Tensor x, Tensor stage, int chunk, int stride, bool transpose,"
    " int splits) -> (Tensor, Tensor)",
    _rotate_backward,
    _fake_rotate_backward,
    triton="rotate_backward:rotate_backward",
    supports={
        "cpu": lambda grad, x, stage, chunk, stride, transpose, splits: _native_takes_stage(
            x, stage, splits
        ),
        "cuda": lambda grad, x, stage, *_: _cuda_takes_stage(x, stage),
        "triton": lambda grad, x, stage, *_: stage.shape[-1] <= MAX_TRITON_SIZE,
    },
)


def apply_stages(
    x: torch.Tensor, matrices: Sequence[torch.Tensor], plan: tuple[Stage, ...], transpose: bool
) -> torch.Tensor:
    """x (N, d) through all the stages, outside of autograd."""
    if len(plan) == 2:
        pair = (x, *matrices, plan[0].chunk, *(stage.stride for stage in plan), transpose)
        if rotate_pair.has_kernel(*pair):
            return rotate_pair(*pair)
    for i in _order(plan, transpose):
        x = rotate_rows(x, matrices[i], plan[i].chunk, plan[i].stride, transpose)
    return x


def apply_stages_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    matrices: Sequence[torch.Tensor],
    plan: tuple[Stage, ...],
    transpose: bool,
    need_x: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """The gradient of x and, unless x is None, the partial sums of each stage's gradient.

    The input of each stage is computed again from x: nothing else of its size needs to be kept.
    """
    order = _order(plan, transpose)
    partials: list[torch.Tensor | None] = [None] * len(plan)
    if x is None:
        return apply_stages(grad, matrices, plan, not transpose) if need_x else None, partials
    inputs = [x]
    for i in order[:-1]:
        stage = (matrices[i], plan[i].chunk, plan[i].stride, transpose)
        inputs.append(rotate_rows(inputs[-1], *stage))
    for i in reversed(order):
        size, chunk, stride = plan[i].size, plan[i].chunk, plan[i].stride
        parts = plan[i].splits(grad)
        if need_x or i != order[0]:
            grad, partials[i] = rotate_backward(
                grad, inputs.pop(), matrices[i], chunk, stride, transpose, parts
            )
        else:
            pair = (grad, inputs.pop()) if transpose else (inputs.pop(), grad)
            partials[i] = gram(*pair, size, chunk, stride, parts)
    return grad if need_x else None, partials


class Rotate(torch.autograd.Function):
    """y = x R (or x R^T) through the stages. Saves x and the stage matrices alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, transpose: bool, plan: tuple[Stage, ...], *matrices):
        return apply_stages(x, matrices, plan, transpose)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.transpose, ctx.plan, *matrices = inputs
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, *matrices)

    @staticmethod
    def backward(ctx, grad):
        x, *matrices = ctx.saved_tensors
        x_grad, partials = apply_stages_backward(
            grad.contiguous(), x, matrices, ctx.plan, ctx.transpose, ctx.needs_input_grad[0]
        )
        grads = [
            None if p is None else p.sum(0).to(matrix.dtype)
            for p, matrix in zip(partials, matrices, strict=True)
        ]
        return x_grad, None, None, *grads


def _order(plan: tuple[Stage, ...], transpose: bool) -> list[int]:
    """R = C_{m-1} ... C_0 on row vectors: x meets the largest stride first, R^T the smallest."""
    order = list(range(len(plan)))
    return order if transpose else order[::-1]


def rotate(
    x: torch.Tensor, matrices: tuple[torch.Tensor, ...], plan: tuple[Stage, ...], transpose: bool
) -> torch.Tensor:
    """x (..., d) times the composed stages (or the transposed product), in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    # Without grad not through the Function: of one with a varying number of arguments Dynamo takes
    # the first for a context then.
    function = Rotate.apply if torch.is_grad_enabled() else Rotate.forward
    return function(rows, transpose, plan, *matrices).reshape(x.shape)
