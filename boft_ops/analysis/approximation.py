"""How well a product of block-sparse rotations approximates a given orthogonal matrix.

min ||R - A||_F over R = C_{m-1} ... C_1 C_0, each C_i made of blocks of SO(b) at given places, is
max tr(R^T A), as both are orthogonal. In one factor alone that is an orthogonal Procrustes problem
for each of its blocks, solved exactly by a singular value decomposition (docs/paper/figure5.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._runtime import checks, linalg
from ..ops.cayley import pack
from ..ops.compose import compose_forward
from ..ops.rotate import gram, rotate_rows
from ..ops.stages import plan


class Factor(NamedTuple):
    """Where the blocks of one factor lie: ``size / chunk`` chunks of features, ``stride`` apart.

    Attributes:
        size: b, rows and columns of a block.
        chunk: features that stay neighbours.
        stride: distance between the chunks of a block, in chunks.
    """

    size: int
    chunk: int
    stride: int


def butterfly_factors(d: int, block_size: int, n_factors: int) -> list[Factor]:
    """The factors of BOFT(m, b), smallest stride first (arXiv 2311.06243, section 4)."""
    checks.butterfly_shape(d, block_size, n_factors)
    if n_factors == 1:
        return [Factor(block_size, block_size, 1)]
    return [Factor(block_size, block_size // 2, 1 << i) for i in range(n_factors)]


def shuffle_factors(d: int, block_size: int, n_factors: int) -> list[Factor]:
    """Block-diagonal factors with the shuffle of Group-and-Shuffle matrices between them.

    Block-diagonal factor, permutation P, block-diagonal factor, P, ... (arXiv 2406.10019), with P
    the transpose of (d/b, b), and every factor written in the order of the original features:
    P^-j diag(...) P^j. For powers of two, P turns the bits of a feature's index by log2(b) places,
    so that factor j mixes the b features whose indices differ in a window of log2(b) bits.

    Raises:
        ValueError: d or block_size is no power of two, or block_size is not in [2, d].
    """
    for name, value in (("d", d), ("block_size", block_size)):
        if value < 2 or value & (value - 1):
            raise ValueError(f"{name}: expected a power of two from 2 up, got {value}")
    if block_size > d:
        raise ValueError(f"block_size: expected at most d = {d}, got {block_size}")
    checks.positive_int("n_factors", n_factors)
    bits, window = d.bit_length() - 1, block_size.bit_length() - 1
    factors = []
    for j in range(n_factors):
        low = j * window % bits
        wrapped = max(0, low + window - bits)  # the lowest bits, which the window comes round to
        factors.append(Factor(block_size, 1 << wrapped, 1 << (low - wrapped if wrapped else low)))
    return factors


class Fit(NamedTuple):
    """What ``approximate`` found.

    Attributes:
        blocks: (m, n * d/b, b, b), the matrices of all factors, in the dtype of the targets; those
            of the n targets side by side, as one product of n d features.
        errors: (sweeps, n), ||R - A||_F^2 / (2 d) after each sweep, in float64.
    """

    blocks: torch.Tensor
    errors: torch.Tensor


class _Stage(NamedTuple):
    """Consecutive factors as one dense matrix for each group of features."""

    group: Factor
    inner: list[Factor]  # within a group, its features in order
    first: int


@torch.no_grad()
def approximate(
    targets: torch.Tensor,
    factors: Sequence[Factor],
    *,
    max_sweeps: int = 200,
    tolerance: float = 1e-3,
    start: torch.Tensor | None = None,
) -> Fit:
    """Block coordinate ascent: each factor in turn is set to its optimum, given all the others.

    The error never grows. It is compared at sweeps 25, 50, 100, ...: where twice the sweeps gained
    less than ``tolerance`` in the mean over the targets, the fit has converged and stops (one
    factor alone is exact after one). All targets are fitted side by side, as the groups of one wide
    product.

    Args:
        targets: (n, d, d), float32 or float64, orthogonal.
        factors: of ``butterfly_factors`` or ``shuffle_factors`` for d, of one block size.
        max_sweeps: how often at most all factors are visited.
        tolerance: of the error ||R - A||_F^2 / (2 d), which is 1 - tr(R^T A) / d.
        start: blocks as in ``Fit``, orthogonal; None starts at the identity, as finetuning does.

    Raises:
        TypeError: targets are not floating-point.
        ValueError: targets are not square, or the factors do not divide d.
    """
    checks.tensor("targets", targets)
    if targets.dim() != 3 or targets.shape[1] != targets.shape[2]:
        raise ValueError(f"targets: expected shape (n, d, d), got {tuple(targets.shape)}")
    n, d, _ = targets.shape
    for factor in factors:
        if d % (factor.size * factor.stride) or factor.size % factor.chunk:
            raise ValueError(f"factors: expected ones that divide {d} features, got {factor}")
    stages, b = _stages(factors), factors[0].size
    shape = (n * d // b, b, b)
    if start is None:
        start = torch.eye(b, dtype=targets.dtype).repeat(len(factors), shape[0], 1, 1)
    blocks = [_grouped(start[i], stage, i) for stage in stages for i in _range(stage)]
    rows = targets.transpose(0, 1).reshape(d, n * d).contiguous()
    eye = torch.eye(d, dtype=targets.dtype).repeat(1, n)
    errors: list[torch.Tensor] = []
    check = 25
    if len(factors) == 1:
        max_sweeps = 1
    while len(errors) < max_sweeps:
        errors.append(1 - _sweep(eye, rows, blocks, stages, n) / d)
        if len(errors) == 2 * check:
            if (errors[check - 1] - errors[-1]).mean() < tolerance:
                break
            check *= 2
    found = [_ungrouped(blocks[i], stage, i) for stage in stages for i in _range(stage)]
    return Fit(torch.stack(found), torch.stack(errors))


def _sweep(
    left: torch.Tensor,
    right: torch.Tensor,
    blocks: list[torch.Tensor],
    stages: list[_Stage],
    n: int,
) -> torch.Tensor:
    """Visit all factors once, change ``blocks``; returns tr(R^T A) of each target, (n,).

    The trace is <C, X^T Y> in a stage with matrix C, where X are the rows of the identity times all
    larger stages and Y the rows of A times the transpose of all smaller ones.
    """
    matrices = [_compose(blocks, stage) for stage in stages]
    for i in range(len(stages) - 1, 0, -1):
        left = _rotate(left, matrices[i], stages[i].group, False)
    for i, stage in enumerate(stages):
        size, chunk, stride = stage.group
        product = gram(left, right, size, chunk, stride, 1)[0]
        if len(stage.inner) == 1:
            blocks[stage.first] = nearest_rotation(product)
        else:
            _visit_group(product, blocks, stage)
        matrices[i] = _compose(blocks, stage)
        if i + 1 < len(stages):
            right = _rotate(right, matrices[i], stage.group, True)
            left = _rotate(left, matrices[i + 1], stages[i + 1].group, True)
    return (product * matrices[-1]).reshape(n, -1).sum(1, dtype=torch.float64)


def _visit_group(product: torch.Tensor, blocks: list[torch.Tensor], stage: _Stage) -> None:
    """The same within the groups of one stage, whose target is ``product`` (groups, s, s)."""
    groups, size, _ = product.shape
    rows = product.transpose(0, 1).reshape(size, groups * size)
    eye = torch.eye(size, dtype=product.dtype).repeat(1, groups)
    inner = [_Stage(factor, [factor], stage.first + j) for j, factor in enumerate(stage.inner)]
    _sweep(eye, rows, blocks, inner, 1)


def nearest_rotation(matrices: torch.Tensor) -> torch.Tensor:
    """The C of SO(b) with the largest <C, M>, for each M of (..., b, b)."""
    if matrices.shape[-1] == 2:  # in closed form: SVDs of thousands of tiny matrices are slow
        cos = matrices[..., 0, 0] + matrices[..., 1, 1]
        sin = matrices[..., 0, 1] - matrices[..., 1, 0]
        angle = torch.atan2(sin, cos)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([cos, sin, -sin, cos], -1).unflatten(-1, (2, 2))
    u, _, vh = torch.linalg.svd(matrices)
    # determinant +1: turn the direction of the smallest singular value round
    u[..., -1] *= linalg.determinant(u @ vh).sign()[..., None]
    return u @ vh


def inverse_cayley(blocks: torch.Tensor) -> torch.Tensor:
    """The packed skew-symmetric parameters with ``cayley(skew) == blocks``, in float64.

    Args:
        blocks: (..., b, b), orthogonal with determinant +1 and without an eigenvalue of -1, which
            no finite parameter gives; near one the parameters are large.

    Returns:
        (..., b(b-1)/2), Q = (R - I)(R + I)^-1 as ``torch.triu_indices(b, b, 1)`` orders it.
    """
    checks.tensor("blocks", blocks, min_dim=2)
    wide = blocks.double()
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    q = linalg.inverse(wide + eye) @ (wide - eye)  # the two factors commute
    return 0.5 * pack(q)


def _stages(factors: Sequence[Factor]) -> list[_Stage]:
    """Butterfly factors in the stages of the package's plan; others one by one."""
    b, m = factors[0].size, len(factors)
    if m == 1 or list(factors) != butterfly_factors(b << (m - 1), b, m):
        return [_Stage(factor, [factor], i) for i, factor in enumerate(factors)]
    return [
        _Stage(
            Factor(s.size, s.chunk, s.stride),
            [Factor(b, s.chunk, 1 << j) for j in range(s.last - s.first)],
            s.first,
        )
        for s in plan(m, b)
    ]


def _range(stage: _Stage) -> range:
    return range(stage.first, stage.first + len(stage.inner))


def _compose(blocks: list[torch.Tensor], stage: _Stage) -> torch.Tensor:
    if len(stage.inner) == 1:
        return blocks[stage.first]
    return compose_forward(torch.stack([blocks[i] for i in _range(stage)]), 0)


def _rotate(
    rows: torch.Tensor, matrix: torch.Tensor, group: Factor, transpose: bool
) -> torch.Tensor:
    return rotate_rows(rows, matrix, group.chunk, group.stride, transpose)


def _grouped(factor: torch.Tensor, stage: _Stage, i: int) -> torch.Tensor:
    """Blocks (K, b, b) of factor i in the order of the stage's groups, then within them."""
    if len(stage.inner) == 1:
        return factor.clone()
    stride, within = stage.group.stride, stage.inner[i - stage.first].stride
    per_group = stage.group.size // stage.inner[0].size
    parts = factor.unflatten(0, (-1, per_group // within, within, stride))
    return parts.movedim(3, 1).flatten(0, 3).contiguous()


def _ungrouped(factor: torch.Tensor, stage: _Stage, i: int) -> torch.Tensor:
    """Inverse of ``_grouped``."""
    if len(stage.inner) == 1:
        return factor
    stride, within = stage.group.stride, stage.inner[i - stage.first].stride
    per_group = stage.group.size // stage.inner[0].size
    parts = factor.unflatten(0, (-1, stride, per_group // within, within))
    return parts.movedim(1, 3).flatten(0, 3).contiguous()
