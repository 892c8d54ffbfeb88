"""Rows times the stages of a butterfly: the only op that touches the activations.

``rotate`` multiplies each row by one block-diagonal stage; ``gram`` is the matching x^T g of its
backward. Both see x (N, d) as N rows of H x M x L chunks of r features, and a stage matrix of group
(h, l) mixes the M chunks that lie L apart.
"""

from __future__ import annotations

import torch

from ._backend import Op
from .plan import Stage


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


def _gram(x: torch.Tensor, grad: torch.Tensor, size: int, chunk: int, stride: int) -> torch.Tensor:
    left = _groups(x, size, chunk, stride)
    right = _groups(grad, size, chunk, stride)
    product = torch.bmm(left.mT, right)
    return product.to(torch.promote_types(x.dtype, torch.float32))


def _fake_rotate(
    x: torch.Tensor, stage: torch.Tensor, chunk: int, stride: int, transpose: bool
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_gram(
    x: torch.Tensor, grad: torch.Tensor, size: int, chunk: int, stride: int
) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[1] // size, size, size, dtype=dtype)


def _native_takes(x: torch.Tensor, size: int) -> bool:
    """float32 and float64, up to the size from which BLAS wins."""
    return torch.finfo(x.dtype).bits >= 32 and size <= 128


rotate_rows = Op(
    "rotate(Tensor x, Tensor stage, int chunk, int stride, bool transpose) -> Tensor",
    _rotate,
    _fake_rotate,
    supports={
        "cpu": lambda x, stage, *_: x.dtype == stage.dtype and _native_takes(x, stage.shape[-1])
    },
)
gram = Op(
    "gram(Tensor x, Tensor grad, int size, int chunk, int stride) -> Tensor",
    _gram,
    _fake_gram,
    supports={"cpu": lambda x, grad, size, *_: _native_takes(x, size)},
)


class Rotate(torch.autograd.Function):
    """y = x R (or x R^T) through the stages. Saves x and the stage matrices alone.

    dx = g R^T and, per stage, d stage = x_k^T g_k, where x_k is the stage's own input, recomputed
    from x. Nothing else of x's size is kept.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, transpose: bool, plan: tuple[Stage, ...], *matrices):
        for i in _order(plan, transpose):
            x = rotate_rows(x, matrices[i], plan[i].chunk, plan[i].stride, transpose)
        return x

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.transpose, ctx.plan, *matrices = inputs
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, *matrices)

    @staticmethod
    def backward(ctx, grad):
        x, *matrices = ctx.saved_tensors
        transpose, plan = ctx.transpose, ctx.plan
        order = _order(plan, transpose)
        need_x, need_matrices = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:])
        grad = grad.contiguous()
        grads = [None] * len(plan)
        inputs = [x]
        if need_matrices:
            for i in order[:-1]:
                stage = (matrices[i], plan[i].chunk, plan[i].stride, transpose)
                inputs.append(rotate_rows(inputs[-1], *stage))
        for i in reversed(order):
            chunk, stride = plan[i].chunk, plan[i].stride
            if need_matrices:
                pair = (grad, inputs.pop()) if transpose else (inputs.pop(), grad)
                grads[i] = gram(*pair, plan[i].size, chunk, stride).to(matrices[i].dtype)
            if need_x or (need_matrices and i != order[0]):
                grad = rotate_rows(grad, matrices[i], chunk, stride, not transpose)
        return grad if need_x else None, None, None, *grads


def _order(plan: tuple[Stage, ...], transpose: bool) -> list[int]:
    """R = C_{m-1} ... C_0 on row vectors: x meets the largest stride first, R^T the smallest."""
    order = list(range(len(plan)))
    return order if transpose else order[::-1]


def rotate(
    x: torch.Tensor, matrices: tuple[torch.Tensor, ...], plan: tuple[Stage, ...], transpose: bool
) -> torch.Tensor:
    """x (..., d) times the composed stages (or the transposed product), in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return Rotate.apply(rows, transpose, plan, *matrices).reshape(x.shape)
