"""Properties of a weight that an orthogonal transform keeps.

These are the singular values, the angles between neurons and the hyperspherical energy. A weight is
a matrix (n, d); its rows are n neurons. The spectral properties are in section 5 of arXiv
2311.06243 and the hyperspherical energy in arXiv 2306.07280. All computations run in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._runtime import checks


class Drift(NamedTuple):
    """Distance that a weight moved, and changes of its geometry.

    All numbers are dimensionless and not negative.

    Attributes:
        distance: ||W' - W||_F / ||W||_F.
        singular_values: largest change of a singular value, divided by the largest singular value.
        spectral_norm: relative change of the largest singular value.
        energy: relative change of the hyperspherical energy.
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
        before: pretrained weight, (n, d) with n >= 2, floating-point, without zero rows.
        after: finetuned weight, of the same shape.

    Raises:
        TypeError: a weight is not a floating-point tensor.
        ValueError: a weight is not a matrix of at least two rows, has a zero row, or the shapes
            differ.
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
    """Compute the angles between all pairs of rows.

    Args:
        weight: (n, d) with n >= 2, floating-point, without zero rows.

    Returns:
        (n(n-1)/2,), float64, in radians.

    Raises:
        TypeError: ``weight`` is not a floating-point tensor.
        ValueError: ``weight`` is not a matrix of at least two rows, or has a zero row.
    """
    rows = _unit_rows(weight)
    i, j = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    return torch.arccos((rows @ rows.mT)[i, j].clamp(-1, 1))


def hyperspherical_energy(weight: torch.Tensor) -> float:
    """Sum 1 / |u - v| over all pairs of rows, where u and v are the rows scaled to length 1.

    arXiv 2306.07280 defines this energy.

    Args:
        weight: (n, d) with n >= 2, floating-point, without zero rows.

    Raises:
        TypeError: ``weight`` is not a floating-point tensor.
        ValueError: ``weight`` is not a matrix of at least two rows, has a zero row, or two of its
            rows have the same direction, which makes the energy infinite.
    """
    distances = torch.pdist(_unit_rows(weight))
    if (distances == 0).any():
        raise ValueError("weight: expected rows of different directions, got two of the same")
    return distances.reciprocal().sum().item()


def orthogonality_error(matrix: torch.Tensor) -> float:
    """Compute ||R^T R - I||_F / sqrt(d), as the root mean square over leading dimensions.

    An orthogonal matrix has the error 0. A matrix whose singular values are all 1 + e has an error
    of about 2 e.

    Args:
        matrix: (..., d, d), floating-point.

    Raises:
        TypeError: ``matrix`` is not a floating-point tensor.
        ValueError: the last two dimensions of ``matrix`` differ.
    """
    checks.tensor("matrix", matrix)
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix: expected shape (..., d, d), got {tuple(matrix.shape)}")
    r = matrix.double()
    excess = r.mT @ r - torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    return (excess.square().sum((-2, -1)).mean() / r.shape[-1]).sqrt().item()


def _unit_rows(weight: torch.Tensor) -> torch.Tensor:
    """Scale the rows to length 1, in float64."""
    weight = _matrix("weight", weight)
    return weight / weight.norm(dim=1, keepdim=True)


def _matrix(name: str, value: torch.Tensor) -> torch.Tensor:
    """Check that an argument is a weight, and convert it to float64."""
    checks.tensor(name, value)
    if value.dim() != 2 or len(value) < 2:
        raise ValueError(f"{name}: expected shape (n, d) with n >= 2, got {tuple(value.shape)}")
    if (value == 0).all(1).any():
        raise ValueError(f"{name}: expected no zero rows, got some")
    return value.detach().double()
