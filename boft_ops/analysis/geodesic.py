"""The shortest way from the identity to a rotation, in the Cayley transform's parameters."""

from __future__ import annotations

import torch

from .._runtime import checks
from ..ops.cayley import unpack


def geodesic(skew: torch.Tensor, t: float) -> torch.Tensor:
    """Parameters of R^t, where ``skew`` holds those of R = (I + Q)(I - Q)^-1.

    R turns planes by angles 2 atan(l), with i l the eigenvalues of Q; R^t turns them by t times
    that, so its parameters have the eigenvalues i tan(t atan(l)). The way is the shortest one in
    SO(b) and is travelled at constant speed. For small Q it is t Q, up to O(|Q|^3).

    Args:
        skew: (..., b(b-1)/2), floating point; computed in float64.
        t: from 0, the identity, to 1, R itself.

    Returns:
        As ``skew``, in its dtype.

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
