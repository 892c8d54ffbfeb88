"""Numerical dimensions of sets of orthogonal matrices with given zeros, and of their products.

``transmission.analyze`` uses them to count the parameters of a factorization.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

STARTS = 4  # random starts of the search for an orthogonal matrix whose zeros form no blocks


class Member(NamedTuple):
    """A random orthogonal matrix B within a pattern, and the directions that keep it there.

    Attributes:
        matrix: B, (n, n), float64.
        moves: pairs of columns (k,) and skew-symmetric matrices (t, k, k). B can move along
            B Omega, where Omega is one of these matrices in the rows and columns given by the pair.
    """

    matrix: torch.Tensor
    moves: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def dimension(self) -> int:
        """Number of independent directions."""
        return sum(len(omegas) for _, omegas in self.moves)


def usable(factor: torch.Tensor, number: int) -> torch.Tensor:
    """Find the entries that differ from zero in some orthogonal matrix within the pattern.

    The squared entries of an orthogonal matrix form a doubly stochastic matrix. By Birkhoff's
    theorem that is a mean of permutations. An entry that no permutation within the pattern contains
    is therefore zero in every orthogonal matrix within it.

    Args:
        factor: (n, n), boolean pattern.
        number: number of the factor, for the error message.

    Returns:
        (n, n), boolean.

    Raises:
        ValueError: there is no permutation within the pattern, so no invertible matrix.
    """
    n = len(factor)
    row_of = _matching(factor)
    if row_of is None:
        raise ValueError(f"pattern: expected an invertible factor, no B_{number} of it is")
    # An edge belongs to some perfect matching if an alternating cycle leads through it.
    reach = factor[:, torch.argsort(row_of)].float() + torch.eye(n)
    for _ in range(n.bit_length()):
        reach = (reach @ reach > 0).float()
    both = (reach * reach.mT) > 0  # rows that reach each other
    return factor & both[:, row_of]


def _matching(factor: torch.Tensor) -> torch.Tensor | None:
    """Match each column with a row of its own, (n,); None if that is impossible."""
    columns = [row.nonzero().flatten().tolist() for row in factor]
    row_of: dict[int, int] = {}

    def augment(start: int) -> bool:
        # Breadth first, because a recursion could be as deep as there are rows.
        parent: dict[int, int] = {}  # column -> the row it was reached from
        queue = [start]
        while queue:
            row = queue.pop(0)
            for column in columns[row]:
                if column in parent:
                    continue
                parent[column] = row
                if column in row_of:
                    queue.append(row_of[column])
                    continue
                while column is not None:
                    taker = parent[column]
                    given_up = next((c for c, r in row_of.items() if r == taker), None)
                    row_of[column] = taker
                    column = given_up if taker != start else None
                return True
        return False

    if not all(augment(row) for row in range(len(factor))):
        return None
    return torch.tensor([row_of[column] for column in range(len(factor))])


def components(allowed: torch.Tensor) -> list[list[torch.Tensor]]:
    """Find the connected components of the graph of a pattern.

    Args:
        allowed: (m, d, d), boolean.

    Returns:
        For each component, its nodes on each of the m + 1 levels, as index tensors.
    """
    m, d, _ = allowed.shape
    label = torch.arange((m + 1) * d).reshape(m + 1, d)
    while True:  # every node takes the smallest label of its neighbors
        before = label.clone()
        for i, factor in enumerate(allowed):
            large = torch.full_like(factor, (m + 1) * d, dtype=torch.int64)
            label[i + 1] = torch.minimum(
                label[i + 1], torch.where(factor, label[i][None, :], large).amin(1)
            )
            label[i] = torch.minimum(
                label[i], torch.where(factor, label[i + 1][:, None], large).amin(0)
            )
        if torch.equal(label, before):
            break
    return [[(row == name).nonzero().flatten() for row in label] for name in label.unique()]


def random_member(factor: torch.Tensor, generator: torch.Generator) -> Member:
    """Draw a random orthogonal matrix within a pattern of usable entries.

    Args:
        factor: (n, n), boolean, as ``usable`` returns it.
        generator: source of the random numbers.

    Raises:
        ValueError: no orthogonal matrix was found within the pattern.
    """
    matrix = torch.zeros(factor.shape, dtype=torch.float64)
    moves = []
    for columns, rows in components(factor[None]):
        part = factor[rows[:, None], columns]
        if part.all():
            block, omegas = _full_block(len(rows), generator)
        else:
            block, omegas = _searched(part, generator)
        matrix[rows[:, None], columns] = block
        moves.append((columns, omegas))
    return Member(matrix, moves)


def _full_block(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw an orthogonal matrix without zeros, and all n(n-1)/2 skew-symmetric directions."""
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    i, j = torch.triu_indices(n, n, 1)
    omegas = torch.zeros(len(i), n, n, dtype=torch.float64)
    every = torch.arange(len(i))
    omegas[every, i, j], omegas[every, j, i] = 1.0, -1.0
    return q, omegas


def _searched(part: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve B^T B = I by Gauss-Newton in the entries that may differ from zero.

    The solutions may form pieces of several dimensions. The search runs from several starts and
    keeps the solution with the most directions.
    """
    n = len(part)
    rows, columns = part.nonzero().T
    upper = torch.triu_indices(n, n)
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    for _ in range(STARTS):
        b = torch.zeros(n, n, dtype=torch.float64)
        b[rows, columns] = torch.randn(len(rows), generator=generator, dtype=torch.float64)
        b /= b.norm(dim=0)
        for _ in range(100):
            residual = (b.mT @ b - torch.eye(n, dtype=b.dtype))[upper[0], upper[1]]
            if residual.abs().max() < 1e-13:
                break
            jacobian = _jacobian(b, rows, columns, upper)
            # gelsd applies the pseudo-inverse, because the equations may depend on each other.
            b[rows, columns] -= torch.linalg.lstsq(jacobian, residual, driver="gelsd").solution
        if not residual.abs().max() < 1e-9:
            continue
        _, values, vh = torch.linalg.svd(_jacobian(b, rows, columns, upper))
        rank = int((values > 1e-9 * values[0]).sum())
        free = vh[rank:]  # directions that change none of the equations
        moves = torch.zeros(len(free), n, n, dtype=torch.float64)
        moves[:, rows, columns] = free
        if best is None or len(free) > len(best[1]):
            best = b, b.mT @ moves
    if best is None:
        raise ValueError("pattern: found no orthogonal matrix within one of its factors")
    return best


def _jacobian(
    b: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, upper: torch.Tensor
) -> torch.Tensor:
    """Derivative of B^T B by the entries of B that may differ from zero, (n(n+1)/2, entries)."""
    change = torch.zeros(len(rows), *b.shape, dtype=b.dtype)
    change[torch.arange(len(rows)), columns] = b[rows]
    change = change + change.mT
    return change[:, upper[0], upper[1]].mT


def product_dimension(members: list[Member]) -> int:
    """Dimension of the set of products B_m ... B_1, at the matrices given.

    It is the rank of a Jacobian. With S = B_{i-1} ... B_1, moving B_i along B_i Omega moves the
    product R along R (S^T Omega S).

    Args:
        members: one matrix per factor, B_1 first, all of one size.
    """
    n = len(members[0].matrix)
    upper = torch.triu_indices(n, n, 1)
    before = torch.eye(n, dtype=torch.float64)
    rows = []
    for matrix, moves in members:
        for columns, omegas in moves:
            part = before[columns]
            rows.append((part.mT @ omegas @ part)[:, upper[0], upper[1]])
        before = matrix @ before
    jacobian = torch.cat(rows)
    return int(torch.linalg.matrix_rank(jacobian)) if jacobian.numel() else 0
