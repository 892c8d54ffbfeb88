"""The weight of a linear layer with several adapters in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from ..ops.cayley import cayley
from ..ops.dropout import drop_blocks
from ..ops.merge import merge_weight
from .base_modules import check_numbers, is_quantized
from .linear_adapter import LinearAdapter
from .rotated_weight import one_draw, rotated_weight


def adapted_weight(base: nn.Module, adapters: Sequence[LinearAdapter]) -> torch.Tensor:
    """The weight of ``base`` with the adapters in it, differentiable and computed when read.

    Reading its numbers raises RuntimeError if ``base`` is quantized or no plain ``nn.Linear``.
    """
    if not adapters:
        return base.weight
    if type(base).forward is not nn.Linear.forward or is_quantized(base):
        return no_weight(base)
    draws = [one_draw(adapter.dropout) for adapter in adapters]
    trained = [tensor for adapter in adapters for tensor in (adapter.skew, adapter.scale)]
    return rotated_weight(partial(_rotate, adapters, draws), base.weight, *trained)


def no_weight(base: nn.Module) -> torch.Tensor:
    """A tensor with the shape, dtype and device of ``base.weight`` that has no numbers."""
    return rotated_weight(_raise, base.weight)


def merge_adapters(weight: torch.Tensor, adapters: Sequence[LinearAdapter]) -> torch.Tensor:
    """The weight with the adapters in it, computed in at least float32 and rounded once."""
    draws = [lambda skew: None for _ in adapters]
    trained = [tensor for adapter in adapters for tensor in (adapter.skew, adapter.scale)]
    return _rotate(adapters, draws, weight, *trained)


def _rotate(
    adapters: Sequence[LinearAdapter], draws: Sequence[Callable], weight: torch.Tensor, *trained
) -> torch.Tensor:
    """The weight with the adapters in it; ``trained`` are skew and scale of each, in a row."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    pairs = zip(trained[::2], trained[1::2], strict=True)
    # x meets the first adapter first, so the weight meets it last
    for adapter, draw, (skew, scale) in reversed(list(zip(adapters, draws, pairs, strict=True))):
        check_numbers({"skew": skew, "scale": scale}, weight)
        blocks = cayley(skew.to(torch.promote_types(skew.dtype, wide.dtype)), method=adapter.method)
        wide = merge_weight(wide, drop_blocks(blocks, draw(skew)), scale)
    return wide.to(weight.dtype)


def _raise(weight: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(
        "weight: expected a call of the MultiAdapterLinear, got a read of its weight, which it "
        "does not have: its base is quantized or not a plain nn.Linear, or rows have adapters of "
        "their own"
    )
