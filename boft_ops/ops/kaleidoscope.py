"""Products of butterflies and transposed butterflies (arXiv 2311.06243, Theorem 1).

R_G = R_{l,1} R_{l,2}^T ... R_{1,1} R_{1,2}^T, the kaleidoscope hierarchy: with l = d - 1 dense
butterflies of 2 x 2 blocks it reaches every rotation of d features (docs/kaleidoscope.md).
"""

from __future__ import annotations

import torch

from .._runtime import autocast, checks
from .butterfly import butterfly_matmul, check_blocks
from .compose import compose
from .planner import plan_for
from .rotate import rotate
from .stages import Stage


def kaleidoscope_matmul(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *, transpose: bool = False
) -> torch.Tensor:
    """x @ R_G, or x @ R_G^T, with R_G = R_{l,1} R_{l,2}^T ... R_{1,1} R_{1,2}^T.

    Every R_{j,i} is a butterfly matrix, as in ``butterfly_matmul``; x meets level l first. If all
    of them are one stage with groups of the same size (up to 64 features on a CPU, more on a GPU),
    their product is composed once and x is read once. Otherwise x goes through 2 l butterflies,
    and each of them keeps its input for backward.

    Equivalent to ``butterfly_matmul(butterfly_matmul(x, first[l]), second[l], transpose=True)`` for
    l from the last level to 0, without ``transpose``.

    Args:
        x: (..., d), float64, float32, bfloat16 or float16.
        first: (l, m1, K1, b1, b1) with K1 * b1 = d: the blocks of R_{1,1}, ..., R_{l,1}.
        second: (l, m2, K2, b2, b2) with K2 * b2 = d: the blocks of R_{1,2}, ..., R_{l,2}.
        transpose: multiply by R_G^T instead.

    Returns:
        (..., d) in the dtype of x.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices do not fit, or no butterfly has such a shape.
    """
    checks.tensor("x", x, min_dim=1)
    shapes = []
    for name, blocks in (("first", first), ("second", second)):
        checks.tensor(name, blocks)
        if blocks.dim() != 5 or 0 in blocks.shape:
            raise ValueError(
                f"{name}: expected shape (levels, n_factors, d/block_size, block_size, block_size),"
                f" got {tuple(blocks.shape)}"
            )
        try:
            m, n_blocks, b = check_blocks(blocks[0])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if n_blocks * b != x.shape[-1]:
            raise ValueError(
                f"{name}: expected butterflies of {x.shape[-1]} features, as x {tuple(x.shape)} "
                f"has, got {n_blocks} blocks * {b}"
            )
        checks.same_device(name, blocks, "x", x)
        shapes.append((m, b))
    if len(first) != len(second):
        raise ValueError(f"second: expected {len(first)} levels, as first has, got {len(second)}")
    x = autocast.cast(x)
    plans = [plan_for(x, m, b) for m, b in shapes]
    if len(plans[0]) == len(plans[1]) == 1 and plans[0][0].size == plans[1][0].size:
        matrix = _compose_levels(first, second, plans[0], plans[1], x.dtype)
        return rotate(x, (matrix,), plans[0], transpose)
    if transpose:
        for one, two in zip(first, second):
            x = butterfly_matmul(butterfly_matmul(x, two), one, transpose=True)
    else:
        for one, two in zip(first.flip(0), second.flip(0)):
            x = butterfly_matmul(butterfly_matmul(x, one), two, transpose=True)
    return x


def _compose_levels(
    first: torch.Tensor,
    second: torch.Tensor,
    first_plan: tuple[Stage, ...],
    second_plan: tuple[Stage, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The dense groups of R_G, (d/size, size, size)."""
    both = torch.promote_types(first.dtype, second.dtype)
    first, second = first.to(both), second.to(both)
    with autocast.disabled(first.device.type):
        levels = _groups(first, first_plan, dtype) @ _groups(second, second_plan, dtype).mT
        product = levels[-1]
        for level in levels[:-1].flip(0):
            product = product @ level
        return product


def _groups(blocks: torch.Tensor, stages: tuple[Stage, ...], dtype: torch.dtype) -> torch.Tensor:
    """The groups of all levels, (l, d/size, size, size), composed as one wide butterfly."""
    n_levels, m, n_blocks, b, _ = blocks.shape
    wide = blocks.transpose(0, 1).reshape(m, n_levels * n_blocks, b, b)
    return compose(wide, stages, dtype)[0].unflatten(0, (n_levels, -1))


def multiply(
    x: torch.Tensor, blocks: torch.Tensor, kaleidoscope: int, transpose: bool = False
) -> torch.Tensor:
    """x R, or x R^T, for the blocks of a layer: one butterfly, or 2 l of them for l levels."""
    if not kaleidoscope:
        return butterfly_matmul(x, blocks, transpose=transpose)
    levels = blocks.unflatten(0, (kaleidoscope, 2, -1))
    return kaleidoscope_matmul(x, levels[:, 0], levels[:, 1], transpose=transpose)
