"""Dense reference implementations for comparison with the package's functions.

They are slow but obviously correct. They follow the definitions and use nothing of the package:
feature maps and permutations are lists of indices, matrices are dense, and blocks are looped over.
"""

import math

import torch


def skew_matrix(packed):
    """Unpack (b(b-1)/2,) to (b, b); the packed entries are the strict upper triangle by rows."""
    b = next(b for b in range(1, 2000) if b * (b - 1) // 2 == packed.numel())
    q = torch.zeros(b, b, dtype=packed.dtype)
    entries = [(i, j) for i in range(b) for j in range(i + 1, b)]
    i, j = torch.tensor(entries, dtype=torch.int64).reshape(-1, 2).T
    q[i, j] = packed
    return q - q.T


def cayley(packed):
    """Compute (I + Q)(I - Q)^-1 with torch's solver in the given dtype.

    The shape (..., b(b-1)/2) becomes (..., b, b).
    """
    leading = packed.shape[:-1]
    blocks = []
    for row in packed.reshape(math.prod(leading), packed.shape[-1]):
        q = skew_matrix(row)
        eye = torch.eye(len(q), dtype=q.dtype)
        blocks.append(torch.linalg.solve(eye - q, eye + q, left=False))
    b = blocks[0].shape[-1]
    return torch.stack(blocks).reshape(*leading, b, b)


def features(i, k, b, m):
    """List the features of block k of factor i, in the order of its rows."""
    if m == 1:
        return [k * b + e for e in range(b)]
    r = b // 2
    g, c = divmod(k, 2**i)
    return [(g * 2 ** (i + 1) + c + (e // r) * 2**i) * r + e % r for e in range(b)]


def factor(blocks, i):
    """Make factor i as a dense (d, d) matrix, from the features of each block."""
    m, n_blocks, b, _ = blocks.shape
    dense = torch.zeros(n_blocks * b, n_blocks * b, dtype=blocks.dtype)
    for k in range(n_blocks):
        index = torch.tensor(features(i, k, b, m))
        dense[index[:, None], index] = blocks[i, k]
    return dense


def permuted_factor(blocks, i):
    """Make factor i as P^T diag(B_0, B_1, ...) P, with an explicit permutation matrix P."""
    m, n_blocks, b, _ = blocks.shape
    d = n_blocks * b
    chunk = b // 2 if m > 1 else b
    order = []  # the feature at each position of the block-diagonal matrix
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
    """Compute R = C_{m-1} ... C_1 C_0 as a dense (d, d) matrix."""
    dense = factor(blocks, len(blocks) - 1)
    for i in range(len(blocks) - 2, -1, -1):
        dense = dense @ factor(blocks, i)
    return dense


def merged_weight(weight, blocks, scale=None, side="in"):
    """Compute the merged weight: W R^T for side "in", R W for side "out", with scaled rows."""
    r = rotation(blocks)
    merged = weight @ r.T if side == "in" else r @ weight
    return merged if scale is None else torch.diag(scale) @ merged


def linear(x, weight, skew, scale=None, bias=None, side="in"):
    """Compute the output of a BOFT layer through its merged weight."""
    y = x @ merged_weight(weight, cayley(skew), scale, side).T
    return y if bias is None else y + bias
