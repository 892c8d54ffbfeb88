"""Skew-symmetric parameters -> stage matrices, dropout included (docs/butterfly.md).

The op ``stage_from_skew`` is cayley, then the identity for dropped blocks, then compose, for
butterflies that one small stage holds. None of its tensors is large: the op saves launches and
passes over little tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .._runtime import checks
from .._runtime.backend import Kernel, Op
from .._runtime.dtypes import COMPUTE
from .._runtime.limits import MAX_ROTATION
from .._runtime.tuned import ShapeClass
from .._runtime.workload import Workload
from .cayley import (
    cayley_backward,
    cayley_backward_reference,
    cayley_forward,
    cayley_reference,
    fake_cayley,
    fake_cayley_backward,
    flops_of_cayley,
    flops_of_cayley_backward,
    neumann5_backward,
    neumann5_forward,
)
from .compose import (
    compose_backward_reference,
    compose_forward,
    compose_gradient,
    compose_reference,
    fake_compose,
    flops_of_compose,
)
from .dropout import drop_blocks
from .stages import Stage, plan

SMALL_BLOCKS = (2, 4, 8)  # BOFT_SMALL_BLOCKS in csrc/cuda/cayley_small.cuh


def _reference(
    skew: torch.Tensor, drop_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = cayley_reference(skew.to(_at_least_float32(skew)), drop_mask)
    return blocks, compose_reference(blocks, 0)


def _backward_reference(
    blocks: torch.Tensor, drop_mask: torch.Tensor | None, grad: torch.Tensor
) -> torch.Tensor:
    return cayley_backward_reference(blocks, drop_mask, compose_backward_reference(blocks, grad, 0))


def _fake(skew: torch.Tensor, drop_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = fake_cayley(skew.to(_at_least_float32(skew)))
    return blocks, fake_compose(blocks, 0)


def _at_least_float32(skew: torch.Tensor) -> torch.dtype:
    return COMPUTE[skew.dtype]


def _triton_supports(skew: torch.Tensor, _: object) -> bool:
    b = checks.block_size_from_packed("skew", skew.shape[-1])
    return b << (skew.shape[0] - 1) <= MAX_ROTATION


def _cuda_supports(
    tensor: torch.Tensor, drop_mask: torch.Tensor | None, *grad: torch.Tensor
) -> bool:
    wide = tensor.dtype in (torch.float32, torch.float64)
    return wide and (
        grad[0].shape[-1] <= MAX_ROTATION if grad else _triton_supports(tensor, drop_mask)
    )


# A thread of the C++ kernels has a whole block of 2, 4 or 8 in float32. They are predicted to be
# faster than Triton's, and not measured on a GPU (docs/cuda.md).
def _cuda_prefers(skew: torch.Tensor, _: object) -> bool:
    packed = [checks.packed_size(b) for b in SMALL_BLOCKS]
    return skew.dtype == torch.float32 and skew.shape[-1] in packed and _triton_supports(skew, _)


def _cuda_prefers_backward(blocks: torch.Tensor, drop_mask: object, grad: torch.Tensor) -> bool:
    is_small = blocks.dtype == torch.float32 and blocks.shape[-1] in SMALL_BLOCKS
    return is_small and grad.shape[-1] <= MAX_ROTATION


def _cpu_supports(
    tensor: torch.Tensor, drop_mask: torch.Tensor | None, *grad: torch.Tensor
) -> bool:
    wide = tensor.dtype in (torch.float32, torch.float64)
    return wide and (len(grad) == 0 or grad[0].shape[0] == 1)  # Dynamo knows no `not` of a tuple


def _is_sampled(w: Workload) -> bool:
    return w.n_factors > 1 and is_one_small_stage(
        plan(w.n_factors, w.block_size, w.device.type), "exact"
    )


def _samples(w: Workload) -> Iterator[tuple]:
    if _is_sampled(w):
        yield w.skew(), None
        yield w.skew(), w.drop_mask()


def _backward_samples(w: Workload) -> Iterator[tuple]:
    for skew, drop_mask in _samples(w):
        with torch.no_grad():
            blocks, stage = _reference(skew, drop_mask)
        (one,) = plan(w.n_factors, w.block_size, w.device.type)
        splits = one.splits(torch.empty(1, w.d, device=w.device))
        yield blocks, drop_mask, w.tensor(splits, *stage.shape, dtype=w.compute_dtype)


def _class_of(skew: torch.Tensor, _: object) -> tuple[tuple, tuple]:
    b = checks.block_size_from_packed("skew", skew.shape[-1])
    return (skew.shape[0], b), (skew.shape[1],)


def flops_of_skew_gradient(blocks: torch.Tensor) -> int:
    """The flops of the gradient of the skew from that of the stage."""
    return 2 * flops_of_compose(blocks) + flops_of_cayley_backward(blocks)


def flops_of_stage_from_skew(skew: torch.Tensor, *_: object) -> int:
    """The flops of the blocks and of the stage."""
    return flops_of_cayley(skew) + flops_of_compose(fake_cayley(skew))


_CLASS = ShapeClass(("n_factors", "block_size"), ("blocks",), _class_of)
stage_from_skew_forward = Op(
    # drop_mask (m, K); returns blocks (m, K, b, b) and stage (d/size, size, size)
    "stage_from_skew(Tensor skew, Tensor? drop_mask) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    kernels={
        "cpu": Kernel(_cpu_supports),
        "cuda": Kernel(_cuda_supports, preferred=_cuda_prefers),
        "triton": Kernel(
            _triton_supports, "stage_from_skew:stage_from_skew", "config:STAGE_FROM_SKEW"
        ),
    },
    shape_class=_CLASS,
    flops=flops_of_stage_from_skew,
)
stage_from_skew_backward = Op(
    # grad (splits, d/size, size, size): partial sums of the stage's gradient
    "stage_from_skew_backward(Tensor blocks, Tensor? drop_mask, Tensor grad) -> Tensor",
    reference=_backward_reference,
    fake=fake_cayley_backward,
    samples=_backward_samples,
    kernels={
        "cpu": Kernel(_cpu_supports),
        "cuda": Kernel(_cuda_supports, preferred=_cuda_prefers_backward),
        "triton": Kernel(
            lambda blocks, drop_mask, grad: grad.shape[-1] <= MAX_ROTATION,
            "stage_from_skew:stage_from_skew_backward",
            "config:STAGE_FROM_SKEW_BACKWARD",
        ),
    },
    shape_class=_CLASS._replace(
        of=lambda blocks, *_: ((blocks.shape[0], blocks.shape[-1]), (blocks.shape[1],))
    ),
    flops=lambda blocks, *_: flops_of_skew_gradient(blocks),
)


class StageFromSkew(torch.autograd.Function):
    """The matrix of the one stage, from skew and a drop mask. Saves both and the blocks."""

    @staticmethod
    def forward(ctx, skew, drop_mask):
        skew = skew.contiguous()
        blocks, stage = stage_from_skew_forward(skew, drop_mask)
        ctx.save_for_backward(skew, blocks, drop_mask)
        return stage

    @staticmethod
    def backward(ctx, grad):
        skew, blocks, drop_mask = ctx.saved_tensors
        if torch.is_grad_enabled():  # to autograd the saved blocks are no function of skew
            blocks = cayley_reference(skew.to(blocks.dtype), drop_mask)
        skew_grad = stage_from_skew_backward(blocks, drop_mask, grad[None].contiguous())
        return skew_grad.to(skew.dtype), None


def is_one_small_stage(stages: tuple[Stage, ...], method: str) -> bool:
    """Return True if the op ``stage_from_skew`` makes the matrices of these stages."""
    return method == "exact" and len(stages) == 1 and stages[0].size <= MAX_ROTATION


def stages_from_skew(
    skew: torch.Tensor,
    drop_mask: torch.Tensor | None,
    method: str,
    stages: tuple[Stage, ...],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the blocks and the matrix of each stage, outside of autograd.

    Equivalent to ``blocks = drop_blocks(cayley(skew, method=method), drop_mask)`` and
    ``[*compose(blocks, stages, dtype)]``. Both results are of the widest of float32, ``dtype`` and
    the dtype of the skew.

    Args:
        skew, drop_mask, method: see ``SkewRotation``.
        stages: how the factors are grouped, see ``plan``.
        dtype: of the rows that the stages are for.

    Returns:
        blocks (m, K, b, b), and for each stage a matrix (d/size, size, size).
    """
    wide = COMPUTE[dtype] if skew.dtype != torch.float64 else skew.dtype
    if skew.dtype != wide:  # comparing the dtypes is faster than a call of .to() that does nothing
        skew = skew.to(wide)
    if skew.shape[0] > 1 and is_one_small_stage(stages, method):
        blocks, stage = stage_from_skew_forward(skew, drop_mask)
        return blocks, [stage]
    if method == "exact":
        blocks = cayley_forward(skew, drop_mask)
    else:
        blocks = drop_blocks(neumann5_forward(skew), drop_mask)
    if blocks.shape[0] == 1:
        return blocks, [blocks[0]]  # one factor is its own stage
    return blocks, [compose_forward(blocks[s.first : s.last], s.first) for s in stages]


def stages_from_skew_backward(
    skew: torch.Tensor,
    drop_mask: torch.Tensor | None,
    method: str,
    stages: tuple[Stage, ...],
    blocks: torch.Tensor,
    partials: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return the gradient of the skew, in its dtype.

    Args:
        skew, drop_mask, method, stages: as they were given to ``stages_from_skew``.
        blocks: as it returned them.
        partials: for each stage the partial sums (splits, d/size, size, size) of its gradient.
    """
    wide = blocks.dtype
    partials = [(p if p.dtype == wide else p.to(wide)).contiguous() for p in partials]
    if is_one_small_stage(stages, method):
        grad = stage_from_skew_backward(blocks, drop_mask, partials[0])
        return grad if skew.dtype == wide else grad.to(skew.dtype)
    if blocks.shape[0] == 1:
        grad = partials[0].sum(0, keepdim=True)
    else:
        grad = compose_gradient(blocks, stages, partials)
    if method == "exact":
        return cayley_backward(blocks, drop_mask, grad).to(skew.dtype)
    if drop_mask is not None:
        grad = grad.masked_fill(drop_mask[..., None, None], 0)
    return neumann5_backward(skew.to(wide), grad).to(skew.dtype)
