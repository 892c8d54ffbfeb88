"""Differentiable conversions between PEFT's parameters and ``skew``. Needs no PEFT.

PEFT BOFT keeps a square matrix A for each block and rotates by (I - S)(I + S)^-1 with
S = (A - A^T)/2, so Q = -S.
PEFT OFT keeps packed blocks, as this package does.
Q = -packed for its exact transform, and Q = +packed for its default series, ``neumann5``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ..._runtime.checks import block_size_from_packed
from ...ops.cayley import pack, unpack

TERMS = 5  # number of terms of PEFT OFT's default series, which is ``neumann5``


class _Entries(NamedTuple):
    """Indices that map the b * b entries of blocks to their packed numbers and back.

    Attributes:
        upper, lower: (b(b-1)/2,), index of (i, j) and of (j, i), i < j.
        packed: (b * b,), index of the packed number at each entry.
        sign: (b * b,), -1/2 above the diagonal, 1/2 below, 0 on it.
    """

    upper: torch.Tensor
    lower: torch.Tensor
    packed: torch.Tensor
    sign: torch.Tensor


@lru_cache(maxsize=64)
def _entries(b: int, device: torch.device, dtype: torch.dtype) -> _Entries:
    """The entries for one block size, cached: computing them takes longer than their use."""
    # Tensors made in inference mode, in which the first call may be, could not be used in training.
    with torch.inference_mode(False):
        i, j = torch.triu_indices(b, b, 1, device=device)
        numbers = torch.arange(1, len(i) + 1, device=device, dtype=torch.float64)
        square = unpack(numbers).flatten()
        packed = (square.abs().long() - 1).clamp(min=0)
        return _Entries(i * b + j, j * b + i, packed, -0.5 * square.sign().to(dtype))


def _is_concrete(tensor: torch.Tensor) -> bool:
    """True for a plain tensor in eager mode, which can be combined with cached tensors."""
    is_tensor = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return is_tensor and not torch.compiler.is_compiling()


class _Skew(torch.autograd.Function):
    """Q = -(A - A^T)/2, packed. The function is linear, so it saves nothing for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(boft_R):
        if not _is_concrete(boft_R):
            return pack(boft_R).mul(-0.5)
        entries = _entries(boft_R.shape[-1], boft_R.device, boft_R.dtype)
        flat = boft_R.reshape(*boft_R.shape[:-2], -1)
        upper, lower = (flat.index_select(-1, i) for i in (entries.upper, entries.lower))
        return lower.sub_(upper).mul_(0.5)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        if not _is_concrete(grad):
            return unpack(grad.contiguous()).mul(-0.5)
        b = block_size_from_packed("grad", grad.shape[-1])
        entries = _entries(b, grad.device, grad.dtype)
        square = grad.index_select(-1, entries.packed).mul(entries.sign)
        return square.reshape(*grad.shape[:-1], b, b)  # torch's older vmap has no unflatten


def boft_skew(boft_R: torch.Tensor) -> torch.Tensor:
    """Convert PEFT BOFT's parameter to ``skew``; the symmetric part of A has no effect.

    Args:
        boft_R: (m, K, b, b), floating point.

    Returns:
        (m, K, b(b-1)/2), in the dtype of ``boft_R``.
    """
    return _Skew.apply(boft_R)


def boft_blocks(skew: torch.Tensor) -> torch.Tensor:
    """Convert ``skew`` to a parameter of PEFT BOFT: the skew-symmetric A = -Q.

    Args:
        skew: (m, K, b(b-1)/2), floating point.

    Returns:
        (m, K, b, b), in the dtype of ``skew``.
    """
    return -unpack(skew)


def oft_skew(weight: torch.Tensor, *, neumann: bool) -> torch.Tensor:
    """Convert PEFT OFT's parameter to ``skew``, or back: it is its own inverse.

    Args:
        weight: (K, b(b-1)/2), floating point.
        neumann: True for PEFT's default, the truncated series, which is ``method="neumann5"`` here;
            False for the exact transform.

    Returns:
        (1, K, b(b-1)/2), in the dtype of ``weight``.
    """
    return (weight if neumann else -weight)[None]
