"""Information transmission of products of sparse orthogonal matrices (arXiv 2311.06243, section 3).

The product R = B_m ... B_1 is a graph of m + 1 levels with d nodes each. Entry (j, k) of B_i is an
edge from node k of level i to node j of level i + 1. R_jk can differ from zero if a path leads from
node k of the first level to node j of the last.

A *pattern* is a boolean tensor (m, d, d) that marks the entries that may differ from zero, B_1
first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from .approximation import Factor, butterfly_factors, shuffle_factors
from .manifold import components, product_dimension, random_member, usable

LARGEST = 64  # numerical ranks are computed for at most this many connected features


def butterfly_pattern(d: int, block_size: int, n_factors: int) -> torch.Tensor:
    """Make the pattern of BOFT(m, b), where B_{i+1} = C_i, (m, d, d).

    Raises:
        ValueError: no butterfly has this d, block_size and n_factors.
    """
    return pattern(d, butterfly_factors(d, block_size, n_factors))


def kaleidoscope_pattern(d: int, block_size: int, n_factors: int, levels: int) -> torch.Tensor:
    """Make the pattern of R_{l,1} R_{l,2}^T ... R_{1,1} R_{1,2}^T (theorem 1 of the paper).

    Args:
        d: number of features.
        block_size: b of every butterfly.
        n_factors: m of every butterfly.
        levels: l, the number of pairs of a butterfly and a transposed one.

    Returns:
        (2 * l * m, d, d), boolean.

    Raises:
        ValueError: no butterfly has this d, block_size and n_factors.
    """
    one = butterfly_pattern(d, block_size, n_factors)
    return torch.cat([one.flip(0).mT, one]).repeat(levels, 1, 1)


def shuffle_pattern(d: int, block_size: int, n_factors: int) -> torch.Tensor:
    """Make the pattern of block-diagonal factors with shuffles between them, (m, d, d).

    ``shuffle_factors`` describes the factors and the errors.
    """
    return pattern(d, shuffle_factors(d, block_size, n_factors))


def pattern(d: int, factors: Sequence[Factor]) -> torch.Tensor:
    """Make the pattern (m, d, d) of factors from the positions of their blocks."""
    result = torch.zeros(len(factors), d, d, dtype=torch.bool)
    for i, (size, chunk, stride) in enumerate(factors):
        feature = torch.arange(d).reshape(-1, size // chunk, stride, chunk)
        groups = feature.transpose(1, 2).reshape(d // size, size)
        result[i, groups[:, :, None], groups[:, None, :]] = True
    return result


def edges_pattern(d: int, edges: Iterable[tuple[int, int, int]]) -> torch.Tensor:
    """Make the pattern of a list of edges, all numbers counted from 1 as in the paper.

    The edges from every node to the node of the same number are always in it.

    Args:
        d: number of nodes in each level.
        edges: tuples (level i, source k, target j); entry (j, k) of B_i may differ from zero.

    Returns:
        (m, d, d), boolean, where m is the largest level of an edge.

    Raises:
        ValueError: there is no edge, or an edge leads from or to a node outside of 1..d.
    """
    edges = list(edges)
    if not edges:
        raise ValueError("edges: expected at least one (level, source, target), got none")
    for edge in edges:
        if len(edge) != 3 or edge[0] < 1 or not all(1 <= node <= d for node in edge[1:]):
            raise ValueError(f"edges: expected (level, source, target) within 1..{d}, got {edge}")
    result = torch.zeros(max(edge[0] for edge in edges), d, d, dtype=torch.bool)
    for level, source, target in edges:
        result[level - 1, target - 1, source - 1] = True
    return result | torch.eye(d, dtype=torch.bool)


def product(pattern: torch.Tensor) -> torch.Tensor:
    """Mark the entries of B_m ... B_1 that may differ from zero, (d, d), boolean."""
    result = torch.eye(pattern.shape[1], dtype=torch.bool)
    for factor in pattern:
        result = (factor.float() @ result.float()) > 0
    return result


class Transmission(NamedTuple):
    """Result of ``analyze``.

    Attributes:
        d: number of features.
        m: number of factors.
        nonzeros: number of entries of the product that may differ from zero; d^2 if it is dense.
        edges: number of edges of all factors, without those that orthogonality forbids.
        forbidden: number of entries of the pattern that are zero in every orthogonal matrix within
            it.
        free_edges: number of edges beyond the d of each factor that any invertible matrix needs.
            This is the paper's count.
        parameters: sum of the dimensions of the factors, as sets of orthogonal matrices; None if it
            was not computed.
        dimension: dimension of the set of products, which is the number of parameters that are not
            redundant; None if it was not computed.
        all_rotations: d(d-1)/2, the dimension of all rotations of d features, for comparison.
    """

    d: int
    m: int
    nonzeros: int
    edges: int
    forbidden: int
    free_edges: int
    parameters: int | None
    dimension: int | None
    all_rotations: int

    @property
    def dense(self) -> bool:
        """True if every entry of the product may differ from zero."""
        return self.nonzeros == self.d**2


def analyze(pattern: torch.Tensor) -> Transmission:
    """Measure the information that a factorization transmits and the size of its family.

    ``parameters`` and ``dimension`` are numerical. They are the ranks of Jacobians at random
    orthogonal matrices within the pattern. They are not computed if more than 64 features are
    connected with each other.

    Args:
        pattern: (m, d, d), boolean, B_1 first.

    Raises:
        TypeError: ``pattern`` is not a boolean tensor.
        ValueError: the shape of ``pattern`` is not (m, d, d), or no orthogonal matrix lies within
            one of its factors.
    """
    if not isinstance(pattern, torch.Tensor) or pattern.dtype != torch.bool:
        raise TypeError(
            f"pattern: expected a boolean tensor, got {getattr(pattern, 'dtype', type(pattern))}"
        )
    if pattern.dim() != 3 or pattern.shape[1] != pattern.shape[2] or 0 in pattern.shape:
        raise ValueError(f"pattern: expected shape (m, d, d), got {tuple(pattern.shape)}")
    m, d, _ = pattern.shape
    allowed = torch.stack([usable(factor, i + 1) for i, factor in enumerate(pattern)])
    parameters: int | None = 0
    dimension: int | None = 0
    for nodes in components(allowed):
        if len(nodes[0]) > LARGEST:
            parameters = dimension = None
            break
        generator = torch.Generator().manual_seed(0)
        members = [
            random_member(factor[after[:, None], before], generator)
            for factor, before, after in zip(allowed, nodes, nodes[1:])
        ]
        parameters += sum(member.dimension for member in members)
        dimension += product_dimension(members)
    edges = int(allowed.sum())
    return Transmission(
        d=d,
        m=m,
        nonzeros=int(product(allowed).sum()),
        edges=edges,
        forbidden=int(pattern.sum()) - edges,
        free_edges=edges - m * d,
        parameters=parameters,
        dimension=dimension,
        all_rotations=d * (d - 1) // 2,
    )
