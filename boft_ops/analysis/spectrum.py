"""What an orthogonal transform of a weight keeps: singular values, angles, hyperspherical energy.

A weight is a matrix (n, d) of n neurons, its rows. arXiv 2311.06243, section 5 ("spectral
properties"), and arXiv 2306.07280 for the hyperspherical energy. Everything is computed in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._runtime import checks


class Drift(NamedTuple):
    """How far a weight has moved, and what of its geometry moved with it. All dimensionless.

    Attributes:
        distance: ||W' - W||_F / ||W||_F.
        singular_values: largest change of a singular value, over the largest singular value.
        spectral_norm: change of the largest singular value, over itself.
        energy: change of the hyperspherical energy, over itself.
        angle: largest change of the angle between two neurons, in radians.
    """

    distance: float
    singular_values: float
    spectral_norm: float
    energy: float
    angle: float


def drift(before: torch.Tensor, after: torch.Tensor) -> Drift:
    """Compare a pretrained weight with a finetuned one.

    Args:
        before, after: (n, d) with n >= 2, floating point, of one shape, without zero rows.

    Raises:
        TypeError, ValueError: an argument is no such matrix.
    """
    before, after = _matrix("before", before), _matrix("after", after)
    if before.shape != after.shape:
        raise ValueError(f"after: expected shape {tuple(before.shape)}, got {tuple(after.shape)}")
    old, new = torch.linalg.svdvals(before), torch.linalg.svdvals(after)
    energies = hyperspherical_energy(before), hyperspherical_energy(after)
    angles = (pairwise_angles(after) - pairwise_angles(before)).abs().max()
    return Drift(
        distance=((after - before).norm() / before.norm()).item(),
        singular_values=((new - old).abs().max() / old[0]).item(),
        spectral_norm=abs(new[0] / old[0] - 1).item(),
        energy=abs(energies[1] / energies[0] - 1),
        angle=angles.item(),
    )


def pairwise_angles(weight: torch.Tensor) -> torch.Tensor:
    """Angles between all pairs of rows of (n, d), in radians, (n (n-1) / 2,) in float64."""
    rows = _unit_rows(weight)
    i, j = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    return torch.arccos((rows @ rows.mT)[i, j].clamp(-1, 1))


def hyperspherical_energy(weight: torch.Tensor) -> float:
    """Sum over all pairs of rows of 1 / |u - v|, u and v being the rows at length 1.

    Raises:
        ValueError: two rows have the same direction, so that the energy is infinite.
    """
    distances = torch.pdist(_unit_rows(weight))
    if (distances == 0).any():
        raise ValueError("weight: expected rows of different directions, got two of the same")
    return distances.reciprocal().sum().item()


def orthogonality_error(matrix: torch.Tensor) -> float:
    """||R^T R - I||_F / sqrt(d) of (..., d, d), the root mean square over leading dimensions.

    0 for an orthogonal matrix; for one whose singular values are all 1 + e, about 2 e.
    """
    checks.tensor("matrix", matrix)
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix: expected shape (..., d, d), got {tuple(matrix.shape)}")
    r = matrix.double()
    excess = r.mT @ r - torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    return (excess.square().sum((-2, -1)).mean() / r.shape[-1]).sqrt().item()


def _unit_rows(weight: torch.Tensor) -> torch.Tensor:
    weight = _matrix("weight", weight)
    return weight / weight.norm(dim=1, keepdim=True)


def _matrix(name: str, value: torch.Tensor) -> torch.Tensor:
    checks.tensor(name, value)
    if value.dim() != 2 or len(value) < 2:
        raise ValueError(f"{name}: expected shape (n, d) with n >= 2, got {tuple(value.shape)}")
    if (value == 0).all(1).any():
        raise ValueError(f"{name}: expected no zero rows, got some")
    return value.detach().double()
