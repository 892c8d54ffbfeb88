"""Skew-symmetric parameters -> stage matrices in one op, dropout included (docs/butterfly.md).

``rotation`` is cayley, then the identity for dropped blocks, then compose, for butterflies that one
small stage holds. Nothing of it is large: what it saves is launches and passes over little tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .._runtime import checks
from .._runtime.backend import Kernel, Op
from .._runtime.tuned import ShapeClass
from .._runtime.workload import Workload
from . import cayley as _cayley
from . import compose as _compose
from .dropout import drop_blocks
from .stages import Stage, plan

MAX_SIZE = 64  # of the one stage that the op composes
# "Methods" of make_matrices: what it is given is the matrix of the one stage already. A stage of
# stride 1 is the one factor of a butterfly whose block_size is its own size.
GIVEN = "given"
GIVEN_SERIES = "given series"  # of a truncated series, as "neumann5" is one
ALL_GIVEN = (GIVEN, GIVEN_SERIES)
ORTHOGONAL = ("exact", GIVEN)  # the methods of which the blocks are; of a series they are nearly so


def _rotation(skew: torch.Tensor, drop: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    wide = skew.to(torch.promote_types(skew.dtype, torch.float32))
    blocks = _cayley.cayley_reference(wide, drop)
    return blocks, _compose.compose_reference(blocks, 0)


def _rotation_backward(
    blocks: torch.Tensor, drop: torch.Tensor | None, grad: torch.Tensor
) -> torch.Tensor:
    return _cayley.cayley_backward_reference(
        blocks, drop, _compose.compose_backward_reference(blocks, grad, 0)
    )


def _fake_rotation(
    skew: torch.Tensor, drop: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = _cayley._fake_forward(skew.to(torch.promote_types(skew.dtype, torch.float32)))
    return blocks, _compose._fake_compose(blocks, 0)


def _triton_takes(skew: torch.Tensor, _: object) -> bool:
    b = checks.block_size_from_packed("skew", skew.shape[-1])
    return b << (len(skew) - 1) <= MAX_SIZE


def _cuda_takes(tensor: torch.Tensor, drop: torch.Tensor | None, *grad: torch.Tensor) -> bool:
    wide = tensor.dtype in (torch.float32, torch.float64)
    return wide and (grad[0].shape[-1] <= MAX_SIZE if grad else _triton_takes(tensor, drop))


def _native_takes(tensor: torch.Tensor, drop: torch.Tensor | None, *grad: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.float64) and (len(grad) == 0 or len(grad[0]) == 1)


def _is_sampled(w: Workload) -> bool:
    return w.n_factors > 1 and is_fused(plan(w.n_factors, w.block_size, w.device.type), "exact")


def _samples(w: Workload) -> Iterator[tuple]:
    if _is_sampled(w):
        yield w.skew(), None
        yield w.skew(), w.drop_mask()


def _backward_samples(w: Workload) -> Iterator[tuple]:
    for skew, drop in _samples(w):
        with torch.no_grad():
            blocks, stage = _rotation(skew, drop)
        (one,) = plan(w.n_factors, w.block_size, w.device.type)
        splits = one.splits(torch.empty(1, w.d, device=w.device))
        yield blocks, drop, w.tensor(splits, *stage.shape, dtype=w.compute_dtype)


def _class_of(skew: torch.Tensor, _: object) -> tuple[tuple, tuple]:
    b = checks.block_size_from_packed("skew", skew.shape[-1])
    return (skew.shape[0], b), (skew.shape[1],)


_CLASS = ShapeClass(("n_factors", "block_size"), ("blocks",), _class_of)
rotation_forward = Op(
    # drop: boolean (m, K) -> blocks (m, K, b, b), stage (d/size, size, size)
    "rotation(Tensor skew, Tensor? drop) -> (Tensor, Tensor)",
    reference=_rotation,
    fake=_fake_rotation,
    samples=_samples,
    kernels={
        "cpu": Kernel(_native_takes),
        "cuda": Kernel(_cuda_takes),
        "triton": Kernel(_triton_takes, "rotation:rotation", "config:ROTATION"),
    },
    shape_class=_CLASS,
)
rotation_backward = Op(
    # grad (splits, d/size, size, size): partial sums of the stage's gradient
    "rotation_backward(Tensor blocks, Tensor? drop, Tensor grad) -> Tensor",
    reference=_rotation_backward,
    fake=_cayley.fake_cayley_backward,
    samples=_backward_samples,
    kernels={
        "cpu": Kernel(_native_takes),
        "cuda": Kernel(_cuda_takes),
        "triton": Kernel(
            lambda blocks, drop, grad: grad.shape[-1] <= MAX_SIZE,
            "rotation:rotation_backward",
            "config:ROTATION_BACKWARD",
        ),
    },
    shape_class=_CLASS._replace(
        of=lambda blocks, *_: ((blocks.shape[0], blocks.shape[-1]), (blocks.shape[1],))
    ),
)


class Rotation(torch.autograd.Function):
    """Stage matrices from skew and a mask. Saves the blocks."""

    @staticmethod
    def forward(ctx, skew, drop):
        skew = skew.contiguous()
        blocks, stage = rotation_forward(skew, drop)
        ctx.save_for_backward(skew, blocks, drop)
        return stage

    @staticmethod
    def backward(ctx, grad):
        skew, blocks, drop = ctx.saved_tensors
        if torch.is_grad_enabled():  # blocks are no function of skew to autograd
            blocks = _cayley.cayley_reference(skew.to(blocks.dtype), drop)
        return rotation_backward(blocks, drop, grad[None].contiguous()).to(skew.dtype), None


def is_fused(plan: tuple[Stage, ...], method: str) -> bool:
    """Whether the op makes the matrices of this plan."""
    return method == "exact" and len(plan) == 1 and plan[0].size <= MAX_SIZE


def make_matrices(
    skew: torch.Tensor,
    drop: torch.Tensor | None,
    plan: tuple[Stage, ...],
    method: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The blocks (dropped ones are the identity) and the matrix of each stage, outside of autograd.

    Both are of the widest of float32, ``dtype`` and the dtype of skew (m, K, b(b-1)/2).
    """
    wide = torch.promote_types(torch.promote_types(skew.dtype, dtype), torch.float32)
    if skew.dtype != wide:  # a call of .to() takes longer to find out
        skew = skew.to(wide)
    if method in ALL_GIVEN:
        return skew[None], [skew]
    if is_fused(plan, method) and skew.shape[0] > 1:
        blocks, stage = rotation_forward(skew, drop)
        return blocks, [stage]
    if method == "exact":
        blocks = _cayley.cayley_forward(skew, drop)
    else:
        blocks = drop_blocks(_cayley.neumann5_forward(skew), drop)
    if len(blocks) == 1:
        return blocks, [blocks[0]]  # one factor is its own stage
    parts = [_compose.compose_forward(blocks[s.first : s.last], s.first) for s in plan]
    return blocks, parts


def make_matrices_backward(
    skew: torch.Tensor,
    blocks: torch.Tensor,
    drop: torch.Tensor | None,
    plan: tuple[Stage, ...],
    method: str,
    partials: Sequence[torch.Tensor],
) -> torch.Tensor:
    """dL/dskew, in its dtype, from the partial sums of each stage's gradient."""
    if method in ALL_GIVEN:
        return partials[0].sum(0).to(skew.dtype)
    wide = blocks.dtype
    partials = [(p if p.dtype == wide else p.to(wide)).contiguous() for p in partials]
    if is_fused(plan, method):
        grad = rotation_backward(blocks, drop, partials[0])
        return grad if skew.dtype == wide else grad.to(skew.dtype)
    if len(blocks) == 1:
        grad = partials[0].sum(0, keepdim=True)
    else:
        grad = _compose.compose_gradient(blocks, plan, partials)
    if method == "exact":
        return _cayley.cayley_backward(blocks, drop, grad).to(skew.dtype)
    if drop is not None:
        grad = grad.masked_fill(drop[..., None, None], 0)
    return _cayley.neumann5_backward(skew.to(blocks.dtype), grad).to(skew.dtype)
