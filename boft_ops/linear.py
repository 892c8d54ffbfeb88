"""The BOFT linear layer as a function (arXiv 2311.06243, sections 3 and 4; docs/linear.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import _autocast, _checks
from .butterfly import butterfly_matmul
from .cayley import METHODS, cayley
from .dropout import multiplicative_dropout
from .scale import scale_columns

SIDES = ("in", "out")


def boft_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    skew: torch.Tensor,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    side: str = "in",
    method: str = "exact",
    dropout: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """A linear layer whose weight is multiplied by an orthogonal butterfly matrix R.

    ``side="in"``: y = s * (x R W^T) + bias, as if W were diag(s) W R^T. ``side="out"``:
    y = s * ((x W^T) R^T) + bias, as if W were diag(s) R W. The bias is not rotated. With ``skew``
    at zero and ``scale`` at one the result equals ``F.linear(x, weight, bias)`` bit for bit.

    Saved for backward beside ``weight`` (a reference): x (side "in") or x W^T (side "out"), the
    blocks and the stage matrices. A trained ``scale`` keeps the (N, n) output before scaling too:
    its gradient needs it, and computing it again would cost a whole matrix product.

    Args:
        x: (..., d).
        weight: (n, d), in the dtype of x (under autocast both are cast, as by torch's linear).
        skew: (m, K, b(b-1)/2), packed as for ``cayley``; K * b = d (side "in") or n (side "out").
            Any floating dtype; float32 is recommended over half-precision weights.
        scale: (n,) or None.
        bias: (n,) or None, finite, in the dtype of x.
        side: ``"in"`` or ``"out"``.
        method: see ``cayley``.
        dropout: ``(p_component, p_block)`` of ``multiplicative_dropout``, or None for none.
        generator: source of the dropout mask; None is torch's default generator.

    Returns:
        (..., n) in the dtype of x (the autocast dtype under autocast).

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, ``side`` or ``method`` is unknown, or no butterfly
            of this shape exists; the message lists the nearest valid (n_factors, block_size).
    """
    _check(x, weight, skew, scale, bias, side, method)
    if dropout is not None and not (isinstance(dropout, tuple) and len(dropout) == 2):
        raise ValueError(f"dropout: expected (p_component, p_block) or None, got {dropout!r}")
    x, weight = _autocast.cast(x), _autocast.cast(weight)
    bias = None if bias is None else _autocast.cast(bias)
    blocks = cayley(skew, method=method)
    if dropout is not None:
        blocks = multiplicative_dropout(blocks, *dropout, training=True, generator=generator)
    if side == "in":
        x = butterfly_matmul(x, blocks)
    # The bias goes into the matrix product, where torch's linear has it, and what the scale and the
    # rotation then do to it is taken back below. Both corrections vanish exactly at the identity.
    y, shift = F.linear(x, weight, bias), bias
    if side == "out":
        y = butterfly_matmul(y, blocks, transpose=True)
        if bias is not None:
            shift = butterfly_matmul(bias, blocks, transpose=True)
    if scale is None:
        return y if side == "in" or bias is None else y + (bias - shift)
    return scale_columns(y, scale, shift, bias)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    skew: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    side: str,
    method: str,
) -> None:
    _checks.tensor("x", x, min_dim=1)
    _checks.tensor("weight", weight)
    _checks.tensor("skew", skew)
    _checks.choice("side", side, SIDES)
    _checks.choice("method", method, METHODS)
    if weight.dim() != 2:
        raise ValueError(
            f"weight: expected shape (out_features, in_features), got {tuple(weight.shape)}"
        )
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"x: expected a last dimension of {weight.shape[1]}, as weight {tuple(weight.shape)} "
            f"has, got shape {tuple(x.shape)}"
        )
    if skew.dim() != 3:
        raise ValueError(
            "skew: expected shape (n_factors, features/block_size, block_size*(block_size-1)/2), "
            f"got {tuple(skew.shape)}"
        )
    b = _checks.block_size_from_packed("skew", skew.shape[-1])
    features = weight.shape[1 if side == "in" else 0]
    if skew.shape[1] * b != features:
        raise ValueError(
            f"skew: expected {features} features on side {side!r}, got {skew.shape[1]} blocks of "
            f"block_size {b}, shape {tuple(skew.shape)}"
        )
    _checks.same_device("weight", weight, "x", x)
    _checks.same_device("skew", skew, "x", x)
    operands = [("weight", weight)]
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is None:
            continue
        _checks.tensor(name, vector)
        if vector.shape != weight.shape[:1]:
            raise ValueError(
                f"{name}: expected shape ({weight.shape[0]},), got {tuple(vector.shape)}"
            )
        _checks.same_device(name, vector, "x", x)
    if bias is not None:
        operands.append(("bias", bias))
    for name, operand in operands:
        if _autocast.cast(operand).dtype != _autocast.cast(x).dtype:
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {operand.dtype}")
