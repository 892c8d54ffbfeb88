"""The shortest path from the identity to a rotation, in the parameters of the Cayley transform."""

from __future__ import annotations

import torch

from .._runtime import checks
from ..ops.cayley import unpack


def geodesic(skew: torch.Tensor, t: float) -> torch.Tensor:
    """Return the parameters of R^t, where ``skew`` holds those of R = (I + Q)(I - Q)^-1.

    If i l is an eigenvalue of Q, R turns a plane by the angle 2 atan(l). R^t turns that plane by t
    times the angle, so its parameters have the eigenvalues i tan(t atan(l)). As t grows, R^t
    follows the shortest path in SO(b) at constant speed. For small Q its parameters are t Q, up to
    O(|Q|^3). The interpolation of arXiv 2311.06243, section 6.3, uses it
    (docs/paper/interpolation.md).

    Args:
        skew: (..., b(b-1)/2), floating-point. The computation runs in float64.
        t: position on the path, from 0 (the identity) to 1 (R itself).

    Returns:
        A tensor of the shape and dtype of ``skew``.

    Raises:
        TypeError: ``skew`` is not a floating-point tensor.
        ValueError: t is not in [0, 1], or the last dimension is not b(b-1)/2 for any b.
    """
    checks.tensor("skew", skew, min_dim=1)
    checks.probability("t", t)
    b = checks.block_size_from_packed("skew", skew.shape[-1])
    hermitian = 1j * unpack(skew.double())
    values, vectors = torch.linalg.eigh(hermitian)
    scaled = torch.tan(t * torch.atan(values))
    q = (vectors * scaled[..., None, :] @ vectors.mH).imag
    i, j = torch.triu_indices(b, b, 1, device=skew.device)
    return q[..., i, j].to(skew.dtype)
