"""Powers and means of rotations, in the parameters of the Cayley transform.

A skew-symmetric Q has eigenvalues i l in pairs. R = (I + Q)(I - Q)^-1 turns the plane of such a
pair by the angle 2 atan(l). Functions of R are functions of these angles, so they are computed from
the eigenvectors of Q, in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .._runtime import checks, linalg
from .cayley import cayley, pack, unpack

# A mean is found once no angle of its last step is larger. Few steps are needed unless the
# rotations are far apart.
_STEP, _MAX_STEPS = 1e-12, 100
_LARGEST = 1e6  # a parameter beyond turns by pi, up to 2e-6, which float32 does not hold
_NO_MEAN = "expected rotations with a mean, got some that differ by angles near pi"
_CANCELED = 1e-6  # share of the norms below which a sum of skews is rounding


def geodesic(skew: torch.Tensor, t: float) -> torch.Tensor:
    """Return the parameters of R^t, where ``skew`` holds those of R = (I + Q)(I - Q)^-1.

    If i l is an eigenvalue of Q, R turns a plane by the angle 2 atan(l). R^t turns that plane by t
    times the angle, so its parameters have the eigenvalues i tan(t atan(l)). As t grows, R^t
    follows the shortest path in SO(b) at constant speed. For small Q its parameters are t Q, up to
    O(|Q|^3). The interpolation of arXiv 2311.06243, section 6.3, uses it
    (docs/paper/interpolation.md).

    Args:
        skew: (..., b(b-1)/2), floating-point. The computation runs in float64.
        t: position on the path: 0 is the identity, 1 is R itself, exactly. Other finite numbers go
            on beyond: 2 is R R, -1 is R^T.

    Returns:
        A tensor of the shape and dtype of ``skew``.

    Raises:
        TypeError: ``skew`` is not a floating-point tensor, or t is no number.
        ValueError: t is not finite, or the last dimension is not b(b-1)/2 for any b.
    """
    checks.tensor("skew", skew, min_dim=1)
    checks.finite("t", t)
    if t == 1:
        return skew.clone()
    return _map_eigenvalues(skew, lambda values: torch.tan(t * torch.atan(values))).to(skew.dtype)


def inverse_cayley(blocks: torch.Tensor) -> torch.Tensor:
    """Return the packed skew-symmetric parameters with ``cayley(skew) == blocks``.

    Args:
        blocks: (..., b, b), floating-point, orthogonal with determinant +1. No finite parameters
            give an eigenvalue of -1, and they grow large near one.

    Returns:
        (..., b(b-1)/2), float64: the upper triangle of Q = (R - I)(R + I)^-1 in the order of
        ``torch.triu_indices(b, b, 1)``.

    Raises:
        TypeError: ``blocks`` is not a floating-point tensor.
        ValueError: ``blocks`` has fewer than two dimensions.
    """
    checks.tensor("blocks", blocks, min_dim=2)
    rotations = blocks.double()
    eye = torch.eye(rotations.shape[-1], dtype=rotations.dtype, device=rotations.device)
    q = linalg.inverse(rotations + eye) @ (rotations - eye)  # the two factors commute
    return 0.5 * pack(q)


def chart_mean(skews: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted mean of the parameters, as long as they are in the mean.

    It is OrthoMerge's mean in the chart of the Cayley transform with magnitude correction (arXiv
    2602.05943): the mean is multiplied by sum_i w_i |Q_i| / |sum_i w_i Q_i|, with Frobenius norms
    over all blocks of a factor. Averaging alone would shorten rotations in different planes.

    Args:
        skews: (n, ..., m, K, b(b-1)/2), floating-point; each factor has a norm of its own.
        weights: (n,), not negative, with a sum of 1.

    Returns:
        (..., m, K, b(b-1)/2), float64. A factor in which the skews cancel, up to rounding, is zero.
    """
    skews = skews.double()
    weights = weights.to(skews)
    mean = torch.tensordot(weights, skews, 1)
    lengths = torch.linalg.vector_norm(skews, dim=(-2, -1), keepdim=True)
    norms = torch.tensordot(weights, lengths, 1)
    norm = torch.linalg.vector_norm(mean, dim=(-2, -1), keepdim=True)
    is_canceled = norm <= _CANCELED * norms
    return torch.where(is_canceled, 0.0, mean * (norms / torch.where(is_canceled, 1.0, norm)))


def karcher_mean(skews: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The rotations whose squared distances to the given ones, weighted, have the smallest sum.

    The distance is the length of the geodesic, so the mean of I and R with weights 1 - t and t is
    R^t, and rotating all of them rotates their mean. From the rotation of the largest weight, each
    step follows the mean of the geodesics to all rotations, until it no longer moves.

    Args:
        skews: (n, ..., b(b-1)/2), floating-point; every block has a mean of its own.
        weights: (n,), not negative, with a sum of 1.

    Returns:
        (..., b(b-1)/2), float64.

    Raises:
        ValueError: rotations differ by so large angles, near pi, that no mean is found, or the mean
            turns by pi, for which there are no parameters.
    """
    skews = skews.double()
    rotations = cayley(skews)
    mean = rotations[weights.argmax()]
    weights = weights.to(skews).view(-1, *[1] * (skews.dim() - 1))
    for _ in range(_MAX_STEPS):
        between = _finite_skew(mean.mT @ rotations)
        step = (weights * _map_eigenvalues(between, lambda values: 2 * torch.atan(values))).sum(0)
        mean = mean @ cayley(_map_eigenvalues(step, lambda angles: torch.tan(angles / 2)))
        if step.numel() == 0 or step.abs().max() <= _STEP:
            return _finite_skew(mean)
    raise ValueError(_NO_MEAN)


def _finite_skew(blocks: torch.Tensor) -> torch.Tensor:
    """``inverse_cayley``, or ValueError for rotations by pi, which have no finite parameters."""
    skew = inverse_cayley(blocks)
    # infinity and NaN are not smaller either
    is_small = skew.numel() == 0 or skew.abs().max() < _LARGEST
    if not (is_small and torch.dist(cayley(skew), blocks) < 1e-6):
        raise ValueError(_NO_MEAN)
    return skew


def _map_eigenvalues(
    skew: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The packed matrix, float64, with eigenvalues i f(l) in the place of i l; f is odd."""
    b = checks.block_size_from_packed("skew", skew.shape[-1])
    values, vectors = torch.linalg.eigh(1j * unpack(skew.double()))
    q = (vectors * function(values)[..., None, :] @ vectors.mH).imag
    i, j = torch.triu_indices(b, b, 1, device=skew.device)
    return q[..., i, j]
