"""The Cayley transform of packed skew-symmetric blocks (arXiv 2311.06243; docs/cayley.md).

R = (I + Q)(I - Q)^-1 with Q skew-symmetric is orthogonal with det +1, and the identity at Q = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from .._runtime import checks, limits, linalg
from .._runtime.backend import Kernel, Op
from .._runtime.dtypes import COMPUTE
from .._runtime.tuned import ShapeClass
from .._runtime.workload import Workload
from .dropout import drop_blocks


def unpack(skew: torch.Tensor) -> torch.Tensor:
    """Packed strict upper triangles (..., b(b-1)/2) -> skew-symmetric blocks (..., b, b)."""
    b = checks.block_size_from_packed("skew", skew.shape[-1])
    if b == 1:
        return skew.new_zeros(*skew.shape[:-1], 1, 1)
    i = torch.arange(b, device=skew.device)[:, None]
    j = torch.arange(b, device=skew.device)
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    packed = low * (2 * b - low - 1) // 2 + high - low - 1  # as triu_indices(b, b, 1) orders them
    packed = packed.clamp(min=0, max=skew.shape[-1] - 1)  # the diagonal: any entry, times sign 0
    sign = torch.sign(j - i).to(skew.dtype)
    # reshape, as torch's older vmap (is_grads_batched, jacobian(vectorize=True)) has no unflatten
    return skew.index_select(-1, packed.flatten()).reshape(*skew.shape[:-1], b, b).mul(sign)


def pack(square: torch.Tensor) -> torch.Tensor:
    """Gradient of ``unpack``: (..., b, b) -> (..., b(b-1)/2), entries U_ij - U_ji for i < j."""
    b = square.shape[-1]
    i, j = torch.triu_indices(b, b, 1, device=square.device)
    flat = (square - square.mT).reshape(*square.shape[:-2], b * b)  # see unpack
    return flat.index_select(-1, i * b + j)


def _solve_dtype(tensor: torch.Tensor) -> torch.dtype:
    # Blocks are tiny beside activations. In float64 R is accurate to float32 rounding even for a
    # large |Q|, where a float32 inverse is off by |Q| times as much. MPS has no float64.
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def cayley_reference(skew: torch.Tensor, drop_mask: torch.Tensor | None = None) -> torch.Tensor:
    q = unpack(skew.to(_solve_dtype(skew)))
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # The symmetric part of I - Q is I: never singular, nothing to check (and no host sync).
    inverse = linalg.inverse(eye - q)
    return drop_blocks((2 * inverse - eye).to(skew.dtype), drop_mask)


def cayley_backward_reference(
    blocks: torch.Tensor, drop_mask: torch.Tensor | None, grad: torch.Tensor
) -> torch.Tensor:
    r = blocks.to(COMPUTE[blocks.dtype])
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    half = (eye + r).mT
    skew_grad = pack(0.5 * (half @ grad.to(r.dtype) @ half)).to(blocks.dtype)
    return skew_grad if drop_mask is None else skew_grad.masked_fill(drop_mask[..., None], 0)


def _horner(q: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """I, P1, P2, P3 with R = I + Q P1, P1 = 2I + Q P2, P2 = 2I + Q P3, P3 = 2I + Q."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    p3 = 2 * eye + q
    p2 = 2 * eye + q @ p3
    return eye, 2 * eye + q @ p2, p2, p3


def _neumann5(skew: torch.Tensor) -> torch.Tensor:
    q = unpack(skew.to(COMPUTE[skew.dtype]))
    eye, p1, _, _ = _horner(q)
    return (eye + q @ p1).to(skew.dtype)


def _neumann5_backward(skew: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    q = unpack(skew.to(COMPUTE[skew.dtype]))
    _, p1, p2, p3 = _horner(q)
    grad = grad.to(q.dtype)
    total = grad @ p1.mT  # Horner's scheme differentiated from the outside in
    for p in (p2, p3):
        grad = q.mT @ grad
        total = total + grad @ p.mT
    return pack(total + q.mT @ grad).to(skew.dtype)


def fake_cayley(skew: torch.Tensor, drop_mask: torch.Tensor | None = None) -> torch.Tensor:
    b = checks.block_size_from_packed("skew", skew.shape[-1])
    return skew.new_empty(*skew.shape[:-1], b, b)


def fake_cayley_backward(
    blocks: torch.Tensor, drop_mask: torch.Tensor | None, grad: torch.Tensor
) -> torch.Tensor:
    return blocks.new_empty(*blocks.shape[:-2], checks.packed_size(blocks.shape[-1]))


def _fake_neumann5_backward(skew: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(skew, memory_format=torch.contiguous_format)


def _sample_skew(w: Workload) -> Iterator[tuple]:
    yield w.skew(), None
    yield w.skew(), w.drop_mask()


def _sample_blocks(w: Workload) -> Iterator[tuple]:
    with torch.no_grad():
        blocks = cayley_reference(w.skew())
    grad = w.tensor(*blocks.shape, dtype=w.compute_dtype)
    yield blocks, None, grad
    yield blocks, w.drop_mask(), grad


def _class_of_blocks(blocks: torch.Tensor, *_: object) -> tuple[tuple, tuple]:
    return (blocks.shape[-1],), (math.prod(blocks.shape[:-2]),)


def _class_of_skew(skew: torch.Tensor, *_: object) -> tuple[tuple, tuple]:
    b = checks.block_size_from_packed("skew", skew.shape[-1])
    return (b,), (math.prod(skew.shape[:-1]),)


def _cpu_supports_skew(skew: torch.Tensor, *_: object) -> bool:
    # the elimination beats LAPACK up to blocks of 128 rows
    return skew.dtype != torch.float16 and skew.shape[-1] <= checks.packed_size(128)


def _cpu_supports_blocks(blocks: torch.Tensor, *_: object) -> bool:
    return blocks.dtype != torch.float16 and blocks.shape[-1] <= 32  # BLAS wins on larger blocks


def _gpu_supports_blocks(blocks: torch.Tensor, *_: object) -> bool:
    return blocks.shape[-1] <= limits.MAX_BLOCK


def _gpu_supports_skew(skew: torch.Tensor, *_: object) -> bool:
    return skew.shape[-1] <= checks.packed_size(limits.MAX_BLOCK)


# On an H200 a thread for each block of 8 takes less time than Triton's kernels, both ways
# (docs/cuda.md). Larger blocks were not timed.
def _cuda_prefers_skew(skew: torch.Tensor, *_: object) -> bool:
    return skew.shape[-1] <= checks.packed_size(8)


def _cuda_prefers_blocks(blocks: torch.Tensor, *_: object) -> bool:
    return blocks.shape[-1] <= 8


def flops_of_cayley(skew: torch.Tensor, *_: object) -> int:
    """The flops of an inverse of each block."""
    b = checks.block_size_from_packed("skew", skew.shape[-1])
    return 2 * b**3 * math.prod(skew.shape[:-1])


def flops_of_cayley_backward(blocks: torch.Tensor, *_: object) -> int:
    """The flops of two matrix products with each block."""
    return 4 * blocks.numel() * blocks.shape[-1]


def _flops_of_neumann5(n_products: int) -> Callable[..., int]:
    return lambda skew, *_: n_products * flops_of_cayley(skew)


cayley_forward = Op(
    "cayley(Tensor skew, Tensor? drop_mask) -> Tensor",
    reference=cayley_reference,
    fake=fake_cayley,
    samples=_sample_skew,
    kernels={
        "cpu": Kernel(_cpu_supports_skew),
        "cuda": Kernel(_gpu_supports_skew, preferred=_cuda_prefers_skew),
        "triton": Kernel(_gpu_supports_skew, "cayley:cayley", "config:CAYLEY"),
    },
    shape_class=ShapeClass(("block_size",), ("blocks",), _class_of_skew),
    flops=flops_of_cayley,
)
cayley_backward = Op(
    "cayley_backward(Tensor blocks, Tensor? drop_mask, Tensor grad) -> Tensor",
    reference=cayley_backward_reference,
    fake=fake_cayley_backward,
    samples=_sample_blocks,
    kernels={
        "cpu": Kernel(_cpu_supports_blocks),
        "cuda": Kernel(_gpu_supports_blocks, preferred=_cuda_prefers_blocks),
        "triton": Kernel(_gpu_supports_blocks, "cayley:cayley_backward", "config:CAYLEY_BACKWARD"),
    },
    shape_class=ShapeClass(("block_size",), ("blocks",), _class_of_blocks),
    flops=flops_of_cayley_backward,
)
neumann5_forward = Op(
    "cayley_neumann5(Tensor skew) -> Tensor",
    reference=_neumann5,
    fake=fake_cayley,
    samples=lambda w: iter([(w.skew(),)]),
    flops=_flops_of_neumann5(3),
)
neumann5_backward = Op(
    "cayley_neumann5_backward(Tensor skew, Tensor grad) -> Tensor",
    reference=_neumann5_backward,
    fake=_fake_neumann5_backward,
    samples=lambda w: ((w.skew(), grad) for *_, grad in _sample_blocks(w)),
    flops=_flops_of_neumann5(8),
)


class Cayley(torch.autograd.Function):
    """R = (I + Q)(I - Q)^-1. Saves R alone: dL/dQ = 1/2 (I + R)^T dL/dR (I + R)^T.

    A layer does not come here: RotatedLinear makes its stages, and their gradients, itself.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(skew):
        return cayley_forward(skew, None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        (blocks,) = ctx.saved_tensors
        return cayley_backward(blocks, None, grad.contiguous())


class CayleyNeumann5(torch.autograd.Function):
    """R = I + 2Q + 2Q^2 + 2Q^3 + Q^4, near the Cayley transform for small Q. Saves Q, packed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(skew):
        return neumann5_forward(skew)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (skew,) = ctx.saved_tensors
        return neumann5_backward(skew, grad.contiguous())


def cayley(skew: torch.Tensor, *, method: str = "exact") -> torch.Tensor:
    """Orthogonal blocks from packed skew-symmetric ones.

    R = (I + Q)(I - Q)^-1, the paper's parametrisation (arXiv 2311.06243, section 3), where Q is
    skew-symmetric with ``skew`` as its strict upper triangle in the row-major order of
    ``torch.triu_indices(b, b, 1)``. Zeros give the identity, exactly.

    Equivalent to ``torch.linalg.solve(eye - q, eye + q)`` for each Q, in float64.

    Args:
        skew: (..., b(b-1)/2) in float64, float32, bfloat16 or float16; b from 1 up.
        method: ``"exact"`` computes in float64 (float32 on MPS) and rounds once. ``"neumann5"`` is
            the truncated series I + 2Q + 2Q^2 + 2Q^3 + Q^4, orthogonal only to O(|Q|^4), for
            checkpoints trained with it.

    Returns:
        (..., b, b) in the dtype of ``skew``. For 0 packed numbers b is 1 and the blocks are [[1]].

    Raises:
        TypeError: ``skew`` is not a floating-point tensor.
        ValueError: its last dimension is not b(b-1)/2 for any b, or ``method`` is unknown.
    """
    checks.tensor("skew", skew, min_dim=1)
    checks.choice("method", method, checks.METHODS)
    checks.block_size_from_packed("skew", skew.shape[-1])
    skew = skew.contiguous()
    if method == "exact":
        return Cayley.apply(skew)
    # saved for backward: a Parameter itself would show it data that was put there later
    return CayleyNeumann5.apply(skew.view_as(skew))
