"""Timing: the cache overwritten, inputs in turn, candidates in turn, medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median, quantiles

import torch

from .machine import Machine, synchronize

SETS = 4  # of inputs, at most
FASTER = 0.98  # of the default's time is what a candidate has to come below
CYCLES = 1 << 18  # that a GPU waits at first while a call is prepared: some 0.15 ms
MOST_CYCLES = 1 << 25


class Timer:
    """Times one call at a time, in seconds, with the caches cold.

    On a GPU events are the clock. The device waits, after the overwriting, for as long as the host
    takes to prepare the call: otherwise the host would be timed, which takes ten times as long as
    the smaller kernels.
    """

    def __init__(self, device: torch.device, machine: Machine) -> None:
        self.device = device
        n_bytes = machine.cache * (4 if device.type == "cuda" else 1)
        self._flush = torch.empty(n_bytes // 4, dtype=torch.int32, device=device)
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            self._cycles = CYCLES

    def __call__(self, run: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            return self._on_device(run)
        self._flush.zero_()
        begin = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - begin
        del result
        return seconds

    def _on_device(self, run: Callable[[], object]) -> float:
        before, start, end = self._events
        while True:
            self._flush.zero_()
            before.record()
            torch.cuda._sleep(self._cycles)
            start.record()
            begin = time.perf_counter()
            result = run()
            prepared = time.perf_counter() - begin
            end.record()
            torch.cuda.synchronize(self.device)
            del result
            waited = before.elapsed_time(start) / 1e3
            if prepared < waited or self._cycles >= MOST_CYCLES:  # some calls wait for the device
                return start.elapsed_time(end) / 1e3
            self._cycles *= 2


def take_turns(
    timer: Timer, runs: Sequence[Callable[[int], object]], rounds: int
) -> list[list[float]]:
    """The times of each run by round; each is called with the number of the round.

    Who comes first changes from round to round.
    """
    times: list[list[float]] = [[] for _ in runs]
    for round_ in range(rounds):
        for i in range(len(runs)):
            at = (i + round_) % len(runs)
            times[at].append(timer(partial(runs[at], round_)))
    synchronize(timer.device)
    return times


def is_faster(times: Sequence[float], default: Sequence[float]) -> bool:
    """By more than noise: in the median of the rounds and in three quarters of them."""
    ratios = [one / other for one, other in zip(times, default, strict=True)]
    return median(ratios) <= FASTER and quantiles(ratios, n=4, method="inclusive")[2] < 1.0


def sets_of(make: Callable[[int], tuple], budget: int) -> list[tuple]:
    """Several sets of inputs, as far as this many bytes hold them; one at least."""
    found = [make(0)]
    n_bytes = sum(t.nbytes for t in found[0] if isinstance(t, torch.Tensor))
    while len(found) < SETS and (len(found) + 1) * n_bytes <= budget:
        found.append(make(len(found)))
    return found
