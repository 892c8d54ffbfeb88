"""Approximation of an orthogonal matrix by a product of block-sparse rotations.

The product is R = C_{m-1} ... C_1 C_0. Each factor C_i consists of blocks of SO(b) at given
positions. Because R and A are both orthogonal, minimizing ||R - A||_F maximizes tr(R^T A). With all
other factors fixed, each block of one factor is an orthogonal Procrustes problem, which a singular
value decomposition solves exactly. Figure 5 of arXiv 2311.06243 is made with these functions
(docs/paper/figure5.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._runtime import checks, linalg
from ..ops.compose import compose_forward
from ..ops.rotate import rotate_rows, rotate_stage_grad
from ..ops.stages import plan


class Factor(NamedTuple):
    """Positions of the blocks of one factor.

    A block acts on ``size / chunk`` chunks of neighboring features, ``stride`` chunks apart.

    Attributes:
        size: b, the number of rows and columns of a block.
        chunk: number of features that stay neighbors.
        stride: distance between two chunks of a block, in chunks.
    """

    size: int
    chunk: int
    stride: int


def butterfly_factors(d: int, block_size: int, n_factors: int) -> list[Factor]:
    """List the factors of BOFT(m, b), smallest stride first (arXiv 2311.06243, section 4).

    Args:
        d: number of features, divisible by block_size * 2^(n_factors - 1).
        block_size: b, the number of rows and columns of a block.
        n_factors: m, the number of factors.

    Raises:
        ValueError: no butterfly has this d, block_size and n_factors.
    """
    checks.butterfly_shape(d, block_size, n_factors)
    if n_factors == 1:
        return [Factor(block_size, block_size, 1)]
    return [Factor(block_size, block_size // 2, 1 << i) for i in range(n_factors)]


def shuffle_factors(d: int, block_size: int, n_factors: int) -> list[Factor]:
    """List block-diagonal factors with the shuffle of Group-and-Shuffle matrices between them.

    The product alternates a block-diagonal factor and a permutation P (arXiv 2406.10019). P
    transposes the features, seen as a (d/b, b) array. Every factor is written in the order of the
    original features, as P^-j diag(...) P^j. For powers of two, P rotates the bits of a feature's
    index by log2(b) positions. Factor j therefore mixes the b features whose indices differ only in
    a window of log2(b) bits.

    Args:
        d: number of features, a power of two.
        block_size: b, the number of rows and columns of a block, a power of two in [2, d].
        n_factors: m, the number of factors.

    Raises:
        ValueError: d or block_size is not a power of two, block_size is not in [2, d], or n_factors
            is not positive.
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
        wrapped = max(0, low + window - bits)  # bits of the window that wrap around to the bottom
        factors.append(Factor(block_size, 1 << wrapped, 1 << (low - wrapped if wrapped else low)))
    return factors


class Fit(NamedTuple):
    """Result of ``approximate``.

    Attributes:
        blocks: (m, n * d/b, b, b), the blocks of all factors, in the dtype of the targets. The
            blocks of the n targets lie side by side, as in one product of n * d features.
        errors: (sweeps, n), float64, ||R - A||_F^2 / (2 d) after each sweep.
    """

    blocks: torch.Tensor
    errors: torch.Tensor


class _Stage(NamedTuple):
    """Consecutive factors as one dense matrix for each group of features."""

    group: Factor
    inner: list[Factor]  # its factors, on the features of one group
    first: int  # index of its first factor


@torch.no_grad()
def approximate(
    targets: torch.Tensor,
    factors: Sequence[Factor],
    *,
    max_sweeps: int = 200,
    tolerance: float = 1e-3,
    start: torch.Tensor | None = None,
) -> Fit:
    """Approximate orthogonal matrices by block coordinate ascent (figure 5 of arXiv 2311.06243).

    Each factor in turn is set to its optimum, given all the others, so the error never grows. The
    error is compared at sweeps 25, 50, 100, and so on. The fit stops when doubling the number of
    sweeps gains less than ``tolerance`` in the mean over the targets. A single factor is exact
    after one sweep. All targets are fitted side by side, as the groups of one product.

    Args:
        targets: (n, d, d), float32 or float64, orthogonal.
        factors: result of ``butterfly_factors`` or ``shuffle_factors`` for d.
        max_sweeps: upper limit of sweeps, each of which visits all factors once.
        tolerance: smallest gain of the error ||R - A||_F^2 / (2 d) that goes on. The error equals
            1 - tr(R^T A) / d.
        start: orthogonal blocks, shaped as in ``Fit``. None starts at the identity, as finetuning
            does.

    Returns:
        The blocks and the error after each sweep.

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
    fitted = [_ungrouped(blocks[i], stage, i) for stage in stages for i in _range(stage)]
    return Fit(torch.stack(fitted), torch.stack(errors))


def _sweep(
    left: torch.Tensor,
    right: torch.Tensor,
    blocks: list[torch.Tensor],
    stages: list[_Stage],
    n: int,
) -> torch.Tensor:
    """Optimize all factors once, in place in ``blocks``; returns tr(R^T A) of each target, (n,).

    For a stage with matrix C the trace equals <C, X^T Y>. X (``left``) is the identity times all
    later stages; Y (``right``) is A times the transposes of all earlier stages.
    """
    matrices = [_compose(blocks, stage) for stage in stages]
    for i in range(len(stages) - 1, 0, -1):
        left = _rotate(left, matrices[i], stages[i].group, False)
    for i, stage in enumerate(stages):
        size, chunk, stride = stage.group
        product = rotate_stage_grad(left, right, size, chunk, stride, 1)[0]
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
    """Sweep over the factors of one stage, whose target is ``product``, (groups, s, s)."""
    groups, size, _ = product.shape
    rows = product.transpose(0, 1).reshape(size, groups * size)
    eye = torch.eye(size, dtype=product.dtype).repeat(1, groups)
    inner = [_Stage(factor, [factor], stage.first + j) for j, factor in enumerate(stage.inner)]
    _sweep(eye, rows, blocks, inner, 1)


def nearest_rotation(matrices: torch.Tensor) -> torch.Tensor:
    """Return the rotation C of SO(b) with the largest inner product <C, M>, for each matrix M.

    Args:
        matrices: (..., b, b), floating-point.

    Returns:
        (..., b, b), rotations in the dtype of ``matrices``.
    """
    if matrices.shape[-1] == 2:  # closed form: the SVD of thousands of tiny matrices is slow
        cos = matrices[..., 0, 0] + matrices[..., 1, 1]
        sin = matrices[..., 0, 1] - matrices[..., 1, 0]
        angle = torch.atan2(sin, cos)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([cos, sin, -sin, cos], -1).unflatten(-1, (2, 2))
    u, _, vh = torch.linalg.svd(matrices)
    # For determinant +1, flip the direction of the smallest singular value where necessary.
    u[..., -1] *= linalg.determinant(u @ vh).sign()[..., None]
    return u @ vh


def _stages(factors: Sequence[Factor]) -> list[_Stage]:
    """Group butterfly factors into the stages of the package's plan, other factors not at all."""
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
    """Indices of the factors of a stage."""
    return range(stage.first, stage.first + len(stage.inner))


def _compose(blocks: list[torch.Tensor], stage: _Stage) -> torch.Tensor:
    """Multiply the factors of a stage into one dense matrix for each group, (groups, s, s)."""
    if len(stage.inner) == 1:
        return blocks[stage.first]
    return compose_forward(torch.stack([blocks[i] for i in _range(stage)]), 0)


def _rotate(
    rows: torch.Tensor, matrix: torch.Tensor, group: Factor, transpose: bool
) -> torch.Tensor:
    """Rotate the groups of each row by a stage's matrix or by its transpose."""
    return rotate_rows(rows, matrix, group.chunk, group.stride, transpose)


def _grouped(factor: torch.Tensor, stage: _Stage, i: int) -> torch.Tensor:
    """Reorder the blocks (K, b, b) of factor i by the stage's groups, then by position in them."""
    if len(stage.inner) == 1:
        return factor.clone()
    stride, within = stage.group.stride, stage.inner[i - stage.first].stride
    per_group = stage.group.size // stage.inner[0].size
    parts = factor.unflatten(0, (-1, per_group // within, within, stride))
    return parts.movedim(3, 1).flatten(0, 3).contiguous()


def _ungrouped(factor: torch.Tensor, stage: _Stage, i: int) -> torch.Tensor:
    """Restore the order of blocks that ``_grouped`` changed."""
    if len(stage.inner) == 1:
        return factor
    stride, within = stage.group.stride, stage.inner[i - stage.first].stride
    per_group = stage.group.size // stage.inner[0].size
    parts = factor.unflatten(0, (-1, stride, per_group // within, within))
    return parts.movedim(1, 3).flatten(0, 3).contiguous()
