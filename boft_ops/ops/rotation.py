"""The two forms of a layer's rotation R: its skew-symmetric parameters, or its finished matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._runtime import checks
from .cayley import cayley
from .dropout import drop_blocks


class SkewRotation(NamedTuple):
    """A butterfly matrix R given by its skew-symmetric parameters.

    Attributes:
        skew: (m, K, b(b-1)/2), packed as for ``cayley``, in any floating dtype.
        method: ``"exact"`` or ``"neumann5"``, see ``cayley``.
        drop_mask: boolean (m, K), true where dropout makes the block the identity, or None.
    """

    skew: torch.Tensor
    method: str = "exact"
    drop_mask: torch.Tensor | None = None

    def factors(self) -> tuple[int, int]:
        """Return (n_factors, block_size) of the butterfly."""
        return len(self.skew), checks.block_size_from_packed("skew", self.skew.shape[-1])

    def is_orthogonal(self) -> bool:
        """Return False for a truncated series, whose blocks are only nearly orthogonal."""
        return self.method == "exact"

    def blocks(self) -> torch.Tensor:
        """Return the blocks (m, K, b, b) as a differentiable function of ``skew``."""
        return drop_blocks(cayley(self.skew, method=self.method), self.drop_mask)


class DenseRotation(NamedTuple):
    """A block-diagonal matrix R given by its groups, dropout included.

    It equals a butterfly of one factor whose block_size is the size of the groups.

    Attributes:
        matrix: (d/size, size, size), in any floating dtype.
        orthogonal: False if the groups may be only nearly orthogonal, as of a truncated series.
    """

    matrix: torch.Tensor
    orthogonal: bool = True

    def factors(self) -> tuple[int, int]:
        """Return (n_factors, block_size) of the equivalent butterfly."""
        return 1, self.matrix.shape[-1]

    def is_orthogonal(self) -> bool:
        return self.orthogonal

    def blocks(self) -> torch.Tensor:
        """Return the groups as the blocks (1, d/size, size, size) of one factor."""
        return self.matrix[None]


Rotation = SkewRotation | DenseRotation
