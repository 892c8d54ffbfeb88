"""Sets of orthogonal matrices with given zeros, and of products of them: numerical dimensions."""

from __future__ import annotations

from typing import NamedTuple

import torch

STARTS = 4  # of the search for an orthogonal matrix with zeros that are no blocks


class Member(NamedTuple):
    """A random orthogonal matrix B within a pattern, and how it can move there.

    Attributes:
        matrix: B, (n, n), float64.
        moves: pairs of columns (k,) and skew-symmetric matrices (t, k, k): B moves along B Omega
            with Omega one of these, placed at the columns.
    """

    matrix: torch.Tensor
    moves: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def dimension(self) -> int:
        return sum(len(omegas) for _, omegas in self.moves)


def usable(factor: torch.Tensor, number: int) -> torch.Tensor:
    """The entries (n, n) that are not zero in every orthogonal matrix within the pattern.

    Squared, the entries of an orthogonal matrix are doubly stochastic, a mean of permutations
    (Birkhoff): an entry that is in no permutation within the pattern is zero.

    Raises:
        ValueError: there is no permutation within the pattern, so no invertible matrix.
    """
    n = len(factor)
    row_of = _matching(factor)
    if row_of is None:
        raise ValueError(f"pattern: expected an invertible factor, no B_{number} of it is")
    # an edge is in some perfect matching if an alternating cycle leads through it
    reach = factor[:, torch.argsort(row_of)].float() + torch.eye(n)
    for _ in range(n.bit_length()):
        reach = (reach @ reach > 0).float()
    both = (reach * reach.mT) > 0  # rows that reach each other
    return factor & both[:, row_of]


def _matching(factor: torch.Tensor) -> torch.Tensor | None:
    """The row that each column is matched with, (n,), if all can be at once."""
    columns = [row.nonzero().flatten().tolist() for row in factor]
    row_of: dict[int, int] = {}

    def augment(start: int) -> bool:
        # breadth first, as a recursion may be as deep as there are rows
        parent: dict[int, int] = {}  # column -> the row that found it
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
    """The connected parts of the graph of a pattern (m, d, d): their nodes on each level."""
    m, d, _ = allowed.shape
    label = torch.arange((m + 1) * d).reshape(m + 1, d)
    while True:  # every node takes the smallest label of its neighbours
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
    """A random orthogonal matrix within a usable pattern (n, n)."""
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
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    i, j = torch.triu_indices(n, n, 1)
    omegas = torch.zeros(len(i), n, n, dtype=torch.float64)
    every = torch.arange(len(i))
    omegas[every, i, j], omegas[every, j, i] = 1.0, -1.0
    return q, omegas


def _searched(part: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss-Newton on B^T B = I in the entries that may differ from zero, from several starts.

    The set may have pieces of several dimensions: the largest that was found counts.
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
            # the pseudo-inverse, as the equations may depend on each other
            b[rows, columns] -= torch.linalg.lstsq(jacobian, residual, driver="gelsd").solution
        if not residual.abs().max() < 1e-9:
            continue
        _, values, vh = torch.linalg.svd(_jacobian(b, rows, columns, upper))
        rank = int((values > 1e-9 * values[0]).sum())
        free = vh[rank:]  # directions in which no equation changes
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
    """d(B^T B) / dB, (n(n+1)/2, entries)."""
    change = torch.zeros(len(rows), *b.shape, dtype=b.dtype)
    change[torch.arange(len(rows)), columns] = b[rows]
    change = change + change.mT
    return change[:, upper[0], upper[1]].mT


def product_dimension(members: list[Member]) -> int:
    """The dimension of the set of products B_m ... B_1, at these members.

    The rank of the Jacobian: with S = B_{i-1} ... B_1, moving B_i along B_i Omega moves the product
    R along R (S^T Omega S).
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
