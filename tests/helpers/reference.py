"""Slow, dense, obviously correct: what the package's functions are compared with.

Written from the definitions, with nothing of the package's own: feature maps and permutations as
lists of indices, matrices of full size, one loop per block.
"""

import math

import torch


def skew_matrix(packed):
    """(P,) -> (b, b): the strict upper triangle, row by row."""
    b = next(b for b in range(1, 2000) if b * (b - 1) // 2 == packed.numel())
    q = torch.zeros(b, b, dtype=packed.dtype)
    entries = [(i, j) for i in range(b) for j in range(i + 1, b)]
    i, j = torch.tensor(entries, dtype=torch.int64).reshape(-1, 2).T
    q[i, j] = packed
    return q - q.T


def cayley(packed):
    """(..., P) -> (..., b, b): (I + Q)(I - Q)^-1 through torch's solver, in the given dtype."""
    leading = packed.shape[:-1]
    blocks = []
    for row in packed.reshape(math.prod(leading), packed.shape[-1]):
        q = skew_matrix(row)
        eye = torch.eye(len(q), dtype=q.dtype)
        blocks.append(torch.linalg.solve(eye - q, eye + q, left=False))
    b = blocks[0].shape[-1]
    return torch.stack(blocks).reshape(*leading, b, b)


def features(i, k, b, m):
    """The features of block k of factor i, in the order of its rows."""
    if m == 1:
        return [k * b + e for e in range(b)]
    r = b // 2
    g, c = divmod(k, 2**i)
    return [(g * 2 ** (i + 1) + c + (e // r) * 2**i) * r + e % r for e in range(b)]


def factor(blocks, i):
    """Factor i as a dense (d, d) matrix, entry by entry through the feature map."""
    m, n_blocks, b, _ = blocks.shape
    dense = torch.zeros(n_blocks * b, n_blocks * b, dtype=blocks.dtype)
    for k in range(n_blocks):
        at = torch.tensor(features(i, k, b, m))
        dense[at[:, None], at] = blocks[i, k]
    return dense


def permuted_factor(blocks, i):
    """Factor i as P^T diag(B_0, B_1, ...) P, with an explicit permutation matrix P."""
    m, n_blocks, b, _ = blocks.shape
    d = n_blocks * b
    chunk = b // 2 if m > 1 else b
    # position p of the block-diagonal matrix holds this feature
    order = []
    n_chunks = d // chunk
    if m == 1:
        chunks = range(n_chunks)
    else:
        pairs = [(c, c + 2**i) for c in range(n_chunks) if (c >> i) % 2 == 0]
        chunks = [c for pair in pairs for c in pair]
    for c in chunks:
        order += range(c * chunk, (c + 1) * chunk)
    permutation = torch.eye(d, dtype=blocks.dtype)[order]
    return permutation.T @ torch.block_diag(*blocks[i]) @ permutation


def rotation(blocks, factor=factor):
    """R = C_{m-1} ... C_1 C_0 as a dense (d, d) matrix."""
    dense = factor(blocks, len(blocks) - 1)
    for i in range(len(blocks) - 2, -1, -1):
        dense = dense @ factor(blocks, i)
    return dense


def merged_weight(weight, blocks, scale=None, side="in"):
    r = rotation(blocks)
    merged = weight @ r.T if side == "in" else r @ weight
    return merged if scale is None else torch.diag(scale) @ merged


def linear(x, weight, skew, scale=None, bias=None, side="in"):
    y = x @ merged_weight(weight, cayley(skew), scale, side).T
    return y if bias is None else y + bias
