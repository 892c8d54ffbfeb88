"""Products with a block-butterfly matrix (arXiv 2311.06243, section 4; docs/butterfly.md)."""

from __future__ import annotations

import operator

import torch

from .._runtime import autocast, checks
from .compose import compose
from .planner import plan_for
from .rotate import rotate


def butterfly_matmul(
    x: torch.Tensor, blocks: torch.Tensor, *, transpose: bool = False
) -> torch.Tensor:
    """x @ R, or x @ R^T, with R = C_{m-1} ... C_1 C_0 the product of m butterfly factors.

    Factor C_i consists of K = d/b dense b x b blocks. With r = b/2, element e of its block k is
    feature ``((k // 2**i) * 2**(i+1) + k % 2**i + (e // r) * 2**i) * r + e % r``: chunks of r
    features 2**i apart, so that x meets the largest stride first. With m = 1 this is a
    block-diagonal product and b may be odd. The blocks may be any matrices, orthogonal or not.

    The factors are composed into dense stages first, as ``plan`` says, and x is read once per
    stage. No d x d matrix, permutation matrix or index tensor is made. Saved for backward: x, the
    blocks and the stage matrices.

    Args:
        x: (..., d), float64, float32, bfloat16 or float16; any strides, any number of rows.
        blocks: (m, K, b, b) with K * b = d, on the device of x; it may be of another floating dtype
            and is composed in at least float32. Under autocast x is cast, blocks are not.
        transpose: multiply by R^T instead.

    Returns:
        (..., d) in the dtype of x.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes do not fit; the message lists the nearest valid (n_factors, block_size).
    """
    checks.tensor("x", x, min_dim=1)
    m, n_blocks, b = check_blocks(blocks)
    if x.shape[-1] != n_blocks * b:
        raise ValueError(
            f"x: expected a last dimension of {n_blocks} blocks * {b} = {n_blocks * b}, "
            f"got shape {tuple(x.shape)}"
        )
    checks.same_device("blocks", blocks, "x", x)
    x = autocast.cast(x)
    stages = plan_for(x, m, b)
    return rotate(x, compose(blocks, stages, x.dtype), stages, transpose)


def check_blocks(blocks: torch.Tensor) -> tuple[int, int, int]:
    """(m, K, b) of blocks (m, K, b, b) that form a butterfly of K * b features."""
    checks.tensor("blocks", blocks)
    if blocks.dim() != 4 or blocks.shape[-1] != blocks.shape[-2] or 0 in blocks.shape:
        raise ValueError(
            "blocks: expected shape (n_factors, d/block_size, block_size, block_size), "
            f"got {tuple(blocks.shape)}"
        )
    # constants of a compiled graph, however dynamic its shapes: they are the structure of R
    m, n_blocks, b = (operator.index(size) for size in blocks.shape[:3])
    checks.butterfly_shape(n_blocks * b, b, m)
    return m, n_blocks, b
