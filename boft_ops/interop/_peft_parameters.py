"""PEFT's parameters in this package's terms, differentiable. Needs no PEFT.

PEFT BOFT keeps a square matrix A for each block and rotates by (I - S)(I + S)^-1 with
S = (A - A^T)/2: Q = -S. PEFT OFT keeps packed blocks as here: Q = -packed in its exact form, and
Q = +packed in its default one, whose series is ``neumann5``.
"""

from __future__ import annotations

import torch

from ..cayley import pack, unpack


class _Skew(torch.autograd.Function):
    """Q = -(A - A^T)/2, packed. Saves nothing: it is linear."""

    @staticmethod
    def forward(ctx, boft_R):
        return pack(boft_R).mul_(-0.5)

    @staticmethod
    def backward(ctx, grad):
        return unpack(grad.contiguous()).mul_(-0.5)


def boft_skew(boft_R: torch.Tensor) -> torch.Tensor:
    """PEFT BOFT's parameter -> ``skew``, up to the symmetric part of A, which has no effect.

    Args:
        boft_R: (m, K, b, b), floating point.

    Returns:
        (m, K, b(b-1)/2), in its dtype.
    """
    return _Skew.apply(boft_R)


def boft_blocks(skew: torch.Tensor) -> torch.Tensor:
    """``skew`` -> a PEFT BOFT parameter with the same rotation: the skew-symmetric A = -Q.

    Args:
        skew: (m, K, b(b-1)/2), floating point.

    Returns:
        (m, K, b, b), in its dtype.
    """
    return -unpack(skew)


def oft_skew(weight: torch.Tensor, *, neumann: bool) -> torch.Tensor:
    """PEFT OFT's parameter -> ``skew``; its own inverse, but for the leading dimension.

    Args:
        weight: (K, b(b-1)/2), floating point.
        neumann: whether it is of PEFT's default form, the truncated series (then to be used with
            ``method="neumann5"``), or of the exact one.

    Returns:
        (1, K, b(b-1)/2), in its dtype.
    """
    return (weight if neumann else -weight)[None]
