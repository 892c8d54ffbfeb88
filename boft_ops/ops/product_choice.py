"""The faster product of a layer on this CPU: fused with the rotation, or torch's own.

The fused product is a kernel of this package. Torch's own comes after a pass that rotates the rows,
and before one that scales the outputs, but its BLAS may multiply faster. That depends on the BLAS
and the CPU far more than on the shape: MKL takes a fourth of the time on the same AMD CPU if it may
use the code that it has for Intel's. So a process times both, once, for each direction.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from .._runtime import internals

# Rows, inputs and outputs of the layer that is timed: large enough that the product takes most of
# the time, small enough that a process hardly notices.
ROWS, FEATURES = 256, 512
MOST_ROUNDS, MOST_SECONDS = 6, 0.1
# The time of torch's product, as a part of the fused one's, from which on it is the choice. The
# fused one writes fewer tensors, which this measurement in warm caches only shows in part.
CLEARLY = 0.95


class Fused(NamedTuple):
    """True for each direction in which a layer uses the fused product."""

    forward: bool
    backward: bool


def faster_products() -> Fused:
    """Return the faster products on this machine; the first call measures them.

    The fused ones, without a measurement, if torch is told to be deterministic: the products round
    differently, and a choice by the clock might be another one in the next process. The same where
    a trace or a dispatch mode, such as a flop counter, would see the measurement.
    """
    watched = internals.tracing_state() is not None or internals.n_dispatch_modes() > 0
    if watched or torch.are_deterministic_algorithms_enabled():
        return Fused(True, True)
    return _measured()


@cache
def _measured() -> Fused:
    from .linear_from_skew import linear_from_skew_backward, linear_from_skew_forward

    generator = torch.Generator().manual_seed(0)  # the user's generator is left alone

    def tensor(*shape: int) -> torch.Tensor:
        # whatever the user's default device and dtype are
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)

    x, weight, grad = (tensor(n, FEATURES) for n in (ROWS, FEATURES, ROWS))
    skew, offset = 0.1 * tensor(2, FEATURES // 8, 28), 0.1 * tensor(FEATURES)
    forward, backward = linear_from_skew_forward.raw, linear_from_skew_backward.raw
    layer, vectors = (x, weight, skew), (offset, 1, None)  # the scale is 1 + offset
    with torch.no_grad():
        y, _, rotation = forward(*layer, None, *vectors, False, True)
        gradient = grad, *layer, rotation, None, *vectors, y, True, 1, False
        return Fused(
            is_fused_faster(lambda fused: forward(*layer, None, *vectors, False, fused)),
            is_fused_faster(lambda fused: backward(*gradient, fused)),
        )


def is_fused_faster(call: Callable[[bool], object]) -> bool:
    """Time ``call(True)`` and ``call(False)`` in turn, and compare the least times."""
    least = {True: float("inf"), False: float("inf")}
    end = time.perf_counter() + MOST_SECONDS
    for _ in range(MOST_ROUNDS):
        for fused in least:
            start = time.perf_counter()
            call(fused)
            least[fused] = min(least[fused], time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return least[False] > CLEARLY * least[True]
