"""PEFT's parameters in this package's terms, differentiable. Needs no PEFT.

PEFT BOFT keeps a square matrix A for each block and rotates by (I - S)(I + S)^-1 with
S = (A - A^T)/2: Q = -S. PEFT OFT keeps packed blocks as here: Q = -packed in its exact form, and
Q = +packed in its default one, whose series is ``neumann5``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ..._runtime.checks import block_size_from_packed
from ...ops.cayley import pack, unpack

TERMS = 5  # of PEFT OFT's default series, which is ``neumann5``


class _Entries(NamedTuple):
    """Where the packed numbers of b x b blocks lie among their b * b.

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
    """Made once: dozens of layers in every step would spend more on them than on the blocks."""
    # not in inference mode, in which the first call may be: no gradient could be taken around them
    with torch.inference_mode(False):
        i, j = torch.triu_indices(b, b, 1, device=device)
        numbers = torch.arange(1, len(i) + 1, device=device, dtype=torch.float64)
        square = unpack(numbers).flatten()
        packed = (square.abs().long() - 1).clamp(min=0)
        return _Entries(i * b + j, j * b + i, packed, -0.5 * square.sign().to(dtype))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Outside of graphs and modes in which tensors that were made before must not turn up."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return plain and not torch.compiler.is_compiling()


class _Skew(torch.autograd.Function):
    """Q = -(A - A^T)/2, packed. Saves nothing: it is linear."""

    generate_vmap_rule = True

    @staticmethod
    def forward(boft_R):
        if not _is_plain(boft_R):
            return pack(boft_R).mul(-0.5)
        at = _entries(boft_R.shape[-1], boft_R.device, boft_R.dtype)
        flat = boft_R.flatten(-2)
        return flat.index_select(-1, at.lower).sub_(flat.index_select(-1, at.upper)).mul_(0.5)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        if not _is_plain(grad):
            return unpack(grad.contiguous()).mul(-0.5)
        b = block_size_from_packed("grad", grad.shape[-1])
        at = _entries(b, grad.device, grad.dtype)
        return grad.index_select(-1, at.packed).mul(at.sign).unflatten(-1, (b, b))


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
