"""Which features a product of sparse orthogonal matrices mixes (arXiv 2311.06243, section 3).

R = B_m ... B_1 is seen as a graph of m + 1 levels of d nodes: entry (j, k) of B_i is an edge from
node k of level i to node j of level i + 1, and R_jk can differ from zero where a path leads from
node k of the first level to node j of the last. A *pattern* is a boolean tensor (m, d, d) of the
entries that may differ from zero, B_1 first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from .approximation import Factor, butterfly_factors, shuffle_factors
from .manifold import components, product_dimension, random_member, usable

LARGEST = 64  # features that are connected with each other, for numerical ranks


def block_diagonal_pattern(d: int, block_size: int) -> torch.Tensor:
    """OFT: one block-diagonal factor, (1, d, d)."""
    return pattern(d, butterfly_factors(d, block_size, 1))


def butterfly_pattern(d: int, block_size: int, n_factors: int) -> torch.Tensor:
    """BOFT(m, b): B_{i+1} = C_i, (m, d, d)."""
    return pattern(d, butterfly_factors(d, block_size, n_factors))


def kaleidoscope_pattern(d: int, block_size: int, n_factors: int, levels: int) -> torch.Tensor:
    """R_{l,1} R_{l,2}^T ... R_{1,1} R_{1,2}^T, all BOFT(m, b): (2 l m, d, d)."""
    one = butterfly_pattern(d, block_size, n_factors)
    return torch.cat([one.flip(0).mT, one]).repeat(levels, 1, 1)


def shuffle_pattern(d: int, block_size: int, n_factors: int) -> torch.Tensor:
    """Block-diagonal factors with shuffles between them, (m, d, d); see ``shuffle_factors``."""
    return pattern(d, shuffle_factors(d, block_size, n_factors))


def pattern(d: int, factors: Sequence[Factor]) -> torch.Tensor:
    """The pattern (m, d, d) of factors whose blocks lie as ``Factor`` says."""
    made = torch.zeros(len(factors), d, d, dtype=torch.bool)
    for i, (size, chunk, stride) in enumerate(factors):
        feature = torch.arange(d).reshape(-1, size // chunk, stride, chunk)
        groups = feature.transpose(1, 2).reshape(d // size, size)
        made[i, groups[:, :, None], groups[:, None, :]] = True
    return made


def edges_pattern(
    d: int, edges: Iterable[tuple[int, int, int]], *, straight: bool = True
) -> torch.Tensor:
    """The pattern of a list of edges (level, source, target), all counted from 1 as in the paper.

    Args:
        d: nodes of each level.
        edges: (i, k, j): entry (j, k) of B_i may differ from zero.
        straight: add the edges from every node to the one of the same number.

    Raises:
        ValueError: there is no edge, or one leads from or to a node that is not in 1..d.
    """
    edges = list(edges)
    if not edges:
        raise ValueError("edges: expected at least one (level, source, target), got none")
    for edge in edges:
        if len(edge) != 3 or edge[0] < 1 or not all(1 <= node <= d for node in edge[1:]):
            raise ValueError(f"edges: expected (level, source, target) within 1..{d}, got {edge}")
    made = torch.zeros(max(edge[0] for edge in edges), d, d, dtype=torch.bool)
    for level, source, target in edges:
        made[level - 1, target - 1, source - 1] = True
    return made | torch.eye(d, dtype=torch.bool) if straight else made


def product(pattern: torch.Tensor) -> torch.Tensor:
    """Where B_m ... B_1 may differ from zero: boolean (d, d)."""
    made = torch.eye(pattern.shape[1], dtype=torch.bool)
    for factor in pattern:
        made = (factor.float() @ made.float()) > 0
    return made


class Transmission(NamedTuple):
    """What ``analyse`` found.

    Attributes:
        d, m: features and factors.
        nonzeros: entries of the product that may differ from zero; d^2 if it is dense.
        edges: of all factors, those that orthogonality forbids left out.
        forbidden: entries of the pattern that are zero in every orthogonal matrix within it.
        free_edges: edges without the d of each factor that any invertible matrix needs, the
            paper's count.
        parameters: the sum of the dimensions of the factors, as sets of orthogonal matrices; None
            if it was not computed.
        dimension: that of the set of products: how many parameters are not redundant.
        all_rotations: d(d-1)/2, for comparison.
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
        return self.nonzeros == self.d**2


def analyse(pattern: torch.Tensor, *, seed: int = 0) -> Transmission:
    """What information a factorisation transmits, and how large a family of matrices it is.

    ``parameters`` and ``dimension`` are numerical: the ranks of Jacobians at random orthogonal
    matrices within the pattern. They are left out where more than 64 features are connected.

    Args:
        pattern: boolean (m, d, d), B_1 first.
        seed: of the random matrices.

    Raises:
        TypeError: ``pattern`` is not a boolean tensor.
        ValueError: its shape is not (m, d, d), or no orthogonal matrix lies within a factor.
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
        generator = torch.Generator().manual_seed(seed)
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
