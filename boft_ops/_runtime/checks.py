"""Argument checks of the public functions.

Every message names the argument, what was expected, and what came.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import nn

from . import autocast
from .dtypes import COMPUTE, name_of

SIDES = ("in", "out")
METHODS = ("exact", "neumann5")
FLOATING = tuple(COMPUTE)


def kaleidoscope(name: str, value: object, n_factors: int) -> None:
    """Check a number of levels l >= 0 of R_{l,1} R_{l,2}^T ... for n_factors."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < 0:
        raise ValueError(f"{name}: expected 0 (a butterfly) or a number of levels, got {value}")
    if value and n_factors == 1:
        raise ValueError(
            f"{name}: expected 0 with n_factors=1, as products of block-diagonal matrices are "
            f"block-diagonal again, got {value}"
        )


def tensor(name: str, value: object, *, min_dim: int = 0) -> None:
    """Check for a dense floating-point tensor of at least ``min_dim`` dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    floating_dtype(name, value.dtype)
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of {value.layout}")
    if value.dim() < min_dim:
        raise ValueError(
            f"{name}: expected at least {min_dim} dimension(s), got shape {tuple(value.shape)}"
        )


def floating_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATING:
        names = ", ".join(map(name_of, FLOATING))
        raise TypeError(f"{name}: expected a dtype of {names}, got {dtype}")


def module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {type(value).__name__}")


def choice(name: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name}: expected one of {options}, got {value!r}")


def probability(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number in [0, 1], got {type(value).__name__}")
    if not 0.0 <= value <= 1.0:  # also refuses NaN
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")


def number(name: str, value: object, *, positive: bool = False) -> None:
    """Check for a finite number that is not negative, or is positive."""
    expected = f"{name}: expected a {'positive' if positive else 'non-negative'} number"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{expected}, got {value!r}")
    if not (0 < value < math.inf if positive else 0 <= value < math.inf):  # also refuses NaN
        raise ValueError(f"{expected}, got {value!r}")


def finite(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a finite number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a positive int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value}")


def same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected the device of {other_name}, {other.device}, got {value.device}"
        )


def packed_size(block_size: int) -> int:
    """The numbers of one packed block, b(b-1)/2."""
    return block_size * (block_size - 1) // 2


def block_size_from_packed(name: str, packed: int) -> int:
    """The b with b (b - 1) / 2 == packed (0 packed numbers: b = 1)."""
    packed = operator.index(packed)  # a constant of a compiled graph, however dynamic its shapes
    b = (1 + math.isqrt(1 + 8 * packed)) // 2
    if packed_size(b) != packed:
        raise ValueError(
            f"{name}: expected a last dimension of b(b-1)/2 numbers for some block size b "
            f"(0, 1, 3, 6, 10, 15, 21, 28, ...), got {packed}"
        )
    return b


def butterfly_shape(features: int, block_size: int, n_factors: int) -> None:
    """Raise ValueError unless a butterfly of n_factors factors of block_size fits ``features``.

    The constraints: ``features % block_size == 0`` and, for more than one factor, an even
    block_size and ``(features / block_size) % 2**(n_factors - 1) == 0``. The message lists the
    nearest valid choices; nothing is ever adjusted on the caller's behalf.
    """
    positive_int("block_size", block_size)
    positive_int("n_factors", n_factors)
    if is_valid(features, block_size, n_factors):
        return
    if features % block_size:
        why = f"block_size: expected a divisor of {features} features, got {block_size}"
    elif block_size % 2:
        why = f"block_size: expected an even number for n_factors={n_factors}, got {block_size}"
    else:
        n_blocks = features // block_size
        why = (
            f"n_factors: expected {features}/{block_size} = {n_blocks} blocks to be a multiple of "
            f"2**(n_factors-1), got n_factors={n_factors}, which needs a multiple of "
            f"{2 ** min(n_factors - 1, 60)}"
        )
    nearest = ", ".join(f"({m}, {b})" for m, b in nearest_valid(features, block_size, n_factors))
    raise ValueError(f"{why}. Nearest valid (n_factors, block_size) for {features}: {nearest}")


def is_valid(features: int, block_size: int, n_factors: int) -> bool:
    if features % block_size or n_factors > features.bit_length():
        return False
    if n_factors == 1:
        return True
    return block_size % 2 == 0 and features // block_size % (1 << (n_factors - 1)) == 0


def nearest_valid(features: int, block_size: int, n_factors: int) -> list[tuple[int, int]]:
    """Up to four valid (n_factors, block_size), nearest first on a log scale of span and size."""

    def distance(choice: tuple[int, int]) -> tuple[float, int, int]:
        m, b = choice
        return abs(math.log2(b) - math.log2(wanted)) + abs(m - n_factors), -m, b

    wanted = min(block_size, features)

    found = []
    for b in (b for b in range(1, min(features, 8 * wanted) + 1) if features % b == 0):
        n_blocks, m = features // b, 1
        found.append((1, b))
        while b % 2 == 0 and n_blocks % 2 == 0:
            n_blocks, m = n_blocks // 2, m + 1
            found.append((m, b))
    return sorted(found, key=distance)[:4]


def linear_arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    skew: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    side: str,
    method: str,
) -> None:
    """Raise TypeError or ValueError unless the arguments of a rotated linear layer fit."""
    named = {"x": x, "weight": weight, "skew": skew, "scale": scale, "bias": bias}
    for name, value in named.items():
        if value is not None or name in ("x", "weight", "skew"):
            tensor(name, value, min_dim=int(name == "x"))
    choice("side", side, SIDES)
    choice("method", method, METHODS)
    if weight.dim() != 2:
        raise ValueError(
            f"weight: expected shape (out_features, in_features), got {tuple(weight.shape)}"
        )
    linear_input(x, weight)
    if skew.dim() != 3:
        raise ValueError(
            "skew: expected shape (n_factors, features/block_size, block_size*(block_size-1)/2), "
            f"got {tuple(skew.shape)}"
        )
    b = block_size_from_packed("skew", skew.shape[-1])
    features = operator.index(weight.shape[1 if side == "in" else 0])
    m = operator.index(skew.shape[0])  # jit.trace hands out tensors for sizes
    if skew.shape[1] * b != features:
        raise ValueError(
            f"skew: expected {features} features on side {side!r}, got {skew.shape[1]} blocks of "
            f"block_size {b}, shape {tuple(skew.shape)}"
        )
    butterfly_shape(features, b, m)
    same_device("skew", skew, "x", x)
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is None:
            continue
        if vector.shape != weight.shape[:1]:
            raise ValueError(
                f"{name}: expected shape ({weight.shape[0]},), got {tuple(vector.shape)}"
            )
        same_device(name, vector, "x", x)
    if bias is not None:
        _same_dtype("bias", bias, "x", x)


def linear_input(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise unless x (..., d) fits a weight (n, d): the one check of a layer at every step."""
    if (  # the usual case in one go, as every function call counts here
        type(x) is torch.Tensor
        and x.dtype == weight.dtype
        and x.dtype in FLOATING
        and x.layout is torch.strided
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and x.device == weight.device
    ):
        return
    tensor("x", x, min_dim=1)
    if hasattr(x, "placements"):  # a DTensor, told without importing torch.distributed
        raise ValueError(
            "x: expected a plain tensor, got a DTensor, as torch's tensor parallelism makes it: "
            "use ColwiseBOFT and RowwiseBOFT of boft_ops.distributed for adapted layers"
        )
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"x: expected a last dimension of {weight.shape[1]}, as weight {tuple(weight.shape)} "
            f"has, got shape {tuple(x.shape)}"
        )
    if weight.is_meta:  # a placeholder without numbers, not an x in the wrong place
        same_device("weight", weight, "x", x)
    same_device("x", x, "weight", weight)
    _same_dtype("x", x, "weight", weight)


def _same_dtype(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if autocast.cast(value).dtype != autocast.cast(other).dtype:
        raise TypeError(
            f"{name}: expected the dtype of {other_name}, {other.dtype}, got {value.dtype}"
        )


def rotation(name: str, value: object, skew: torch.Tensor, dropout: object) -> None:
    """Check the dense groups of the butterfly that ``skew`` parametrizes, without dropout."""
    tensor(name, value)
    m, n_blocks, packed = skew.shape
    size = block_size_from_packed("skew", packed) << (m - 1)
    expected = n_blocks >> (m - 1), size, size
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
    same_device(name, value, "skew", skew)
    if dropout is not None:
        raise ValueError(f"dropout: expected None beside a rotation, got {dropout!r}")
