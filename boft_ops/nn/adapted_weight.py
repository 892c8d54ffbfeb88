"""The weight of a linear layer with several adapters in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn

from .._runtime.dtypes import widest
from ..ops.merge import merge_rotations
from ..ops.rotation import SkewRotation
from ..ops.scale import scale_of
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
    rotate = partial(_rotate, adapters, draws)
    return rotated_weight(rotate, base.weight, *_trained(adapters))


def no_weight(base: nn.Module) -> torch.Tensor:
    """A tensor with the shape, dtype and device of ``base.weight`` that has no numbers."""
    return rotated_weight(_raise, base.weight)


def weight_with(weight: torch.Tensor, adapters: Sequence[LinearAdapter]) -> torch.Tensor:
    """The weight with the adapters in it, computed in at least float32 and rounded once."""
    draws = [lambda skew: None for _ in adapters]
    return _rotate(adapters, draws, weight, *_trained(adapters))


def _trained(adapters: Sequence[LinearAdapter]) -> list[torch.Tensor | None]:
    """The skew and the scale_offset of each adapter, in a row."""
    return [own for adapter in adapters for own in (adapter.own_skew(), adapter.own_offset())]


def _rotate(
    adapters: Sequence[LinearAdapter], draws: Sequence[Callable], weight: torch.Tensor, *trained
) -> torch.Tensor:
    """The weight with the adapters in it; ``trained`` are what ``_trained`` returns."""
    pairs = zip(trained[::2], trained[1::2], strict=True)
    # x meets the first adapter first, so the weight meets it last
    in_order = reversed(list(zip(adapters, draws, pairs, strict=True)))

    def rotations() -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        for adapter, draw, (skew, offset) in in_order:
            check_numbers({"skew": skew, "scale_offset": offset}, weight)
            wide = skew.to(widest(skew.dtype, weight.dtype))
            yield SkewRotation(wide, adapter.method, draw(skew)).blocks(), scale_of(offset)

    return merge_rotations(weight, rotations())


def _raise(weight: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(
        "weight: expected a call of the MultiAdapterLinear, got a read of its weight, which it "
        "does not have: its base is quantized or not a plain nn.Linear, or rows have adapters of "
        "their own"
    )
