"""Representation of any rotation as a kaleidoscope (theorem 1 of arXiv 2311.06243).

The paper's proof is constructive, but it uses Householder reflections. These have determinant -1,
so no product of Cayley blocks equals one. Here the reflections come in pairs, which are rotations
(docs/paper/theorem1.md).
"""

from __future__ import annotations

import torch

from .._runtime import checks
from ..ops.geodesic import inverse_cayley


def kaleidoscope_parameters(
    rotation: torch.Tensor, block_size: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute parameters whose kaleidoscope R_G equals a given rotation.

    R_G = R_{l,1} R_{l,2}^T ... R_{1,1} R_{1,2}^T has l = d - 1 levels of dense butterflies. Every
    rotation has such parameters, and they are at most 1 in absolute value. The function is meant
    for small d, because it takes O(d^3 log d) operations.

    Args:
        rotation: (d, d), floating-point, orthogonal to 1e-4 with determinant +1. The computation
            runs in float64.
        block_size: b, even, with d = b * 2^(m-1) for some m. The default is 2.

    Returns:
        The skews of R_{1,1}, ..., R_{l,1} and those of R_{1,2}, ..., R_{l,2}, each of shape
        (l, m, d/b, b(b-1)/2) in float64.
        ``kaleidoscope_matmul(x, cayley(first), cayley(second))`` is x @ rotation.

    Raises:
        TypeError: ``rotation`` is not a floating-point tensor.
        ValueError: ``rotation`` is not square and orthogonal, its determinant is -1, or no dense
            butterfly has this d and block_size.
    """
    checks.tensor("rotation", rotation)
    if rotation.dim() != 2 or rotation.shape[0] != rotation.shape[1] or len(rotation) < 2:
        raise ValueError(f"rotation: expected shape (d, d), got {tuple(rotation.shape)}")
    rest = rotation.detach().double()
    d = len(rest)
    eye = torch.eye(d, dtype=rest.dtype, device=rest.device)
    error = float((rest @ rest.mT - eye).abs().max())
    if not error <= 1e-4:
        raise ValueError(f"rotation: expected an orthogonal matrix, got one off by {error:.1e}")
    if torch.linalg.det(rest) < 0:
        raise ValueError(
            "rotation: expected determinant +1, got -1, which no product of Cayley transforms has"
        )
    m = dense_factors(d, block_size)
    shape = (d - 1, m, d // block_size, checks.packed_size(block_size))
    first = torch.zeros(shape, dtype=rest.dtype, device=rest.device)
    second = torch.zeros_like(first)
    mirrored = False  # true while a reflection D of feature 0 is left over on the right
    for level, k in enumerate(range(d - 1, 0, -1)):
        normal = _householder(rest[:, k], k)
        if normal is None:  # the column is e_k already
            continue
        # H = V D V^T, and D V^T D is also the transpose of a butterfly: that of V mirrored.
        skew = inverse_cayley(_gather(normal, block_size, m))
        mirrored_skew = skew.clone()
        mirrored_skew[:, 0, : block_size - 1] *= -1
        index = d - 2 - level  # the last level is the leftmost factor
        if mirrored:
            first[index], second[index] = mirrored_skew, skew
        else:
            first[index], second[index] = skew, mirrored_skew
        mirrored = not mirrored
        rest = rest - 2 * normal[:, None] * (normal @ rest)
    return first, second


def dense_factors(d: int, block_size: int) -> int:
    """Return the m for which BOFT(m, block_size) mixes all d features: block_size * 2^(m-1) = d.

    Raises:
        ValueError: ``block_size`` is odd, or d is not a power of two times ``block_size``.
    """
    checks.positive_int("block_size", block_size)
    m = (d // block_size).bit_length()
    if block_size % 2 or block_size << max(m - 1, 0) != d:
        raise ValueError(
            f"block_size: expected an even number that d = {d} is a power of two times of, "
            f"got {block_size}"
        )
    return m


def _householder(column: torch.Tensor, k: int) -> torch.Tensor | None:
    """Return the unit normal of the mirror that maps a column, zero below k, to e_k.

    None means that the column is e_k already.
    """
    normal, head = column.clone(), column[:k].square().sum()
    normal[k + 1 :] = 0
    if head == 0 and column[k] > 0:
        return None
    # This is x_k - 1 without cancellation, because the column has norm 1.
    normal[k] = -head / (1 + column[k]) if column[k] > 0 else column[k] - 1
    return normal / normal.norm()


def _gather(vector: torch.Tensor, block_size: int, m: int) -> torch.Tensor:
    """Make the blocks (m, K, b, b) of a butterfly V with V^T vector = +-|vector| e_0.

    Each block turns the vector of its features onto the first of them. It turns by at most a
    quarter turn, so its Cayley parameters stay within [-1, 1].
    """
    d, r = len(vector), block_size // 2
    blocks = []
    for i in reversed(range(m)):  # V^T applies the factor of the largest stride first
        # Runs of 2^(i+1) chunks; element e of a block is in chunk e // r of a pair 2^i apart.
        runs = vector.reshape(-1, 2, 1 << i, r).transpose(1, 2)
        parts = runs.reshape(d // block_size, block_size)
        norms = parts.norm(dim=1, keepdim=True)
        signs = torch.where(parts[:, :1] < 0, -1.0, 1.0).to(parts.dtype)
        start = torch.zeros_like(parts)
        start[:, 0] = 1
        unit = torch.where(norms > 0, signs * parts / norms, start)
        total = unit + start
        # The rotation in the plane of ``unit`` and ``start`` that maps ``unit`` to ``start``.
        turn = torch.eye(block_size, dtype=parts.dtype, device=parts.device)
        turn = turn - total[:, :, None] * total[:, None, :] / (1 + unit[:, :1, None])
        turn = turn + 2 * start[:, :, None] * unit[:, None, :]
        blocks.append(turn.mT)
        gathered = signs * norms * start
        vector = gathered.reshape(-1, 1 << i, 2, r).transpose(1, 2).reshape(d)
    return torch.stack(blocks[::-1])
