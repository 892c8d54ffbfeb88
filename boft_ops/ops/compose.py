"""Butterfly factors -> dense stage matrices (docs/butterfly.md).

Factors first, first+1, ... act on chunks of r = b/2 features: factor i mixes chunk c with chunk
c + 2^i. Their product is block-diagonal over H x L groups, L = 2^first: group (h, l) holds the
chunks l, l + L, l + 2L, ... of a run. Everything below is views and small batched products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._runtime.backend import Kernel, Op
from .._runtime.dtypes import widest
from .._runtime.limits import MAX_BLOCK, MAX_STAGE
from .._runtime.tuned import ShapeClass
from .._runtime.workload import Workload
from .cayley import cayley_reference
from .stages import Stage, plan


def _pair(factor: torch.Tensor, stride: int, chunks: int) -> torch.Tensor:
    """The next factor (K, b, b), as the left operand that joins two groups of ``chunks`` chunks.

    Returns (H, L, chunks, 2, b, r): the outgoing half of each block is a batch dimension, so that
    the product has no structural zero.
    """
    n_blocks, b, _ = factor.shape
    r = b // 2
    halves = factor.reshape(n_blocks // (chunks * stride), chunks, stride, b, 2, r)
    return halves.permute(0, 2, 1, 4, 3, 5)


def _unpair(paired: torch.Tensor) -> torch.Tensor:
    """Inverse of ``_pair``."""
    h, stride, chunks, _, b, r = paired.shape
    return paired.permute(0, 2, 1, 4, 3, 5).reshape(h * chunks * stride, b, 2 * r)


def _halves(group: torch.Tensor, chunks: int) -> torch.Tensor:
    """Groups (2H, L, s, s) as the right operand (H, L, chunks, 2, r, s)."""
    h2, stride, s, _ = group.shape
    split = group.reshape(h2 // 2, 2, stride, chunks, s // chunks, s)
    return split.permute(0, 2, 3, 1, 4, 5)


def _unhalves(operand: torch.Tensor) -> torch.Tensor:
    """Inverse of ``_halves``."""
    h, stride, chunks, _, r, s = operand.shape
    return operand.permute(0, 3, 1, 2, 4, 5).reshape(2 * h, stride, chunks * r, s)


def _join(product: torch.Tensor) -> torch.Tensor:
    """Products (H, L, chunks, 2, 2r, s) as groups of twice the size, (H, L, 2s, 2s)."""
    h, stride, chunks, _, b, s = product.shape
    split = product.reshape(h, stride, chunks, 2, 2, b // 2, s)
    return split.permute(0, 1, 4, 2, 5, 3, 6).reshape(h, stride, 2 * s, 2 * s)


def _unjoin(group: torch.Tensor, chunks: int) -> torch.Tensor:
    """Inverse of ``_join``, for groups of 2 * ``chunks`` chunks."""
    h, stride, s2, _ = group.shape
    s = s2 // 2
    r = s // chunks
    split = group.reshape(h, stride, 2, chunks, r, 2, s)
    return split.permute(0, 1, 3, 5, 2, 4, 6).reshape(h, stride, chunks, 2, 2 * r, s)


def _partial(factors: torch.Tensor, first: int) -> list[torch.Tensor]:
    """The product of the first 1, 2, ... factors, each (H, L, s, s)."""
    n, n_blocks, b, _ = factors.shape
    stride = 1 << first
    groups = [factors[0].reshape(n_blocks // stride, stride, b, b)]
    for i in range(1, n):
        paired = _pair(factors[i], stride, 1 << i)
        groups.append(_join(paired @ _halves(groups[-1], 1 << i)))
    return groups


def compose_reference(factors: torch.Tensor, first: int) -> torch.Tensor:
    groups = _partial(factors, first)[-1]
    stage = groups.reshape(-1, *groups.shape[2:])
    return stage.clone() if len(factors) == 1 else stage  # an op must not return its input


def compose_backward_reference(
    factors: torch.Tensor, grad: torch.Tensor, first: int
) -> torch.Tensor:
    stride = 1 << first
    groups = _partial(factors, first)
    # reshape, as torch's older vmap (is_grads_batched, jacobian(vectorize=True)) has no unflatten
    grad = grad.sum(0).reshape(grad.shape[1] // stride, stride, *grad.shape[2:])
    grads = []
    for i in range(len(factors) - 1, 0, -1):
        paired, halves = _pair(factors[i], stride, 1 << i), _halves(groups[i - 1], 1 << i)
        product = _unjoin(grad, 1 << i)
        grads.append(_unpair(product @ halves.mT))
        grad = _unhalves(paired.mT @ product)
    grads.append(grad.reshape(factors.shape[1:]))
    return torch.stack(grads[::-1])


def fake_compose(factors: torch.Tensor, first: int) -> torch.Tensor:
    n, n_blocks, b, _ = factors.shape
    size = b << (n - 1)
    return factors.new_empty(n_blocks * b // size, size, size)


def fake_compose_backward(factors: torch.Tensor, grad: torch.Tensor, first: int) -> torch.Tensor:
    return torch.empty_like(factors, memory_format=torch.contiguous_format)


def _cpu_supports(factors: torch.Tensor, grad_or_first: torch.Tensor | int, *_: int) -> bool:
    """Stages that fit a core's cache; BLAS wins beyond."""
    n, _, b, _ = factors.shape
    one_part = not isinstance(grad_or_first, torch.Tensor) or len(grad_or_first) == 1
    return b << (n - 1) <= 64 and b % 2 == 0 and one_part


def _cuda_supports(factors: torch.Tensor, *_: object) -> bool:
    n, _, b, _ = factors.shape
    wide = factors.dtype in (torch.float32, torch.float64)
    return wide and b << (n - 1) <= MAX_STAGE and (n == 1 or b % 2 == 0)


def _triton_supports(factors: torch.Tensor, *_: object) -> bool:
    n, _, b, _ = factors.shape
    return n == 1 or (b % 2 == 0 and b <= MAX_BLOCK and b << (n - 1) <= MAX_STAGE)


def _sample_factors(w: Workload) -> Iterator[tuple[torch.Tensor, Stage]]:
    """The factors (last - first, K, b, b) of each stage that is composed, and the stage."""
    if w.n_factors == 1:
        return
    with torch.no_grad():
        blocks = cayley_reference(w.skew())
    for stage in plan(w.n_factors, w.block_size, w.device.type):
        yield blocks[stage.first : stage.last], stage


def _samples(w: Workload) -> Iterator[tuple]:
    for factors, stage in _sample_factors(w):
        yield factors, stage.first


def _backward_samples(w: Workload) -> Iterator[tuple]:
    for factors, stage in _sample_factors(w):
        splits = stage.splits(torch.empty(1, w.d, device=w.device))
        shape = splits, w.d // stage.size, stage.size, stage.size
        yield factors, w.tensor(*shape, dtype=w.compute_dtype), stage.first


def _class_of(factors: torch.Tensor, *_: object) -> tuple[tuple, tuple]:
    return (factors.shape[0], factors.shape[-1]), (factors.shape[1],)


def flops_of_compose(factors: torch.Tensor, *_: object) -> int:
    """The flops of multiplying the groups of the first factors by each further one."""
    m, n_blocks, b = factors.shape[:3]
    return sum(2 * n_blocks * b * (b << level) * b for level in range(1, m))


_CLASS = ShapeClass(("n_factors", "block_size"), ("blocks",), _class_of)
compose_forward = Op(
    "compose(Tensor factors, int first) -> Tensor",
    reference=compose_reference,
    fake=fake_compose,
    samples=_samples,
    kernels={
        "cpu": Kernel(_cpu_supports),
        "cuda": Kernel(_cuda_supports),
        "triton": Kernel(_triton_supports, "compose:compose"),
    },
    shape_class=_CLASS,
    flops=flops_of_compose,
)
compose_backward = Op(
    # grad (splits, d/size, size, size): partial sums, added up here
    "compose_backward(Tensor factors, Tensor grad, int first) -> Tensor",
    reference=compose_backward_reference,
    fake=fake_compose_backward,
    samples=_backward_samples,
    kernels={
        "cpu": Kernel(_cpu_supports),
        "cuda": Kernel(_cuda_supports),
        "triton": Kernel(_triton_supports, "compose:compose_backward"),
    },
    shape_class=_CLASS,
    flops=lambda factors, *_: 2 * flops_of_compose(factors),
)


class Compose(torch.autograd.Function):
    """All stage matrices of a butterfly, (d/size, size, size) each. Saves the blocks alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(blocks, stages: tuple[Stage, ...]):
        return tuple(compose_forward(blocks[s.first : s.last], s.first) for s in stages)

    @staticmethod
    def setup_context(ctx, inputs, output):
        blocks, ctx.stages = inputs
        ctx.save_for_backward(blocks)

    @staticmethod
    def backward(ctx, *grads):
        (blocks,) = ctx.saved_tensors
        return compose_gradient(blocks, ctx.stages, [grad[None] for grad in grads]), None


def compose_gradient(
    blocks: torch.Tensor, stages: tuple[Stage, ...], partials: list[torch.Tensor]
) -> torch.Tensor:
    """dL/dblocks from the partial sums (splits, d/size, size, size) of each stage's gradient."""
    parts = [
        compose_backward(blocks[s.first : s.last], grad.contiguous(), s.first)
        for s, grad in zip(stages, partials, strict=True)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def compose(
    blocks: torch.Tensor, stages: tuple[Stage, ...], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Blocks (m, K, b, b) -> the matrix of each stage, (d/size, size, size).

    Computed in the widest of the blocks' dtype, ``dtype`` and float32.
    """
    blocks = blocks.to(widest(blocks.dtype, dtype)).contiguous()
    if blocks.shape[0] == 1:
        return (blocks[0],)  # one factor is its own stage
    # saved for backward: a Parameter itself would show it data that was put there later
    return Compose.apply(blocks.view_as(blocks), stages)
