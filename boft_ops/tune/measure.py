"""Timing: the cache overwritten, inputs in turn, candidates in turn, medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median, quantiles

import torch

FASTER = 0.98  # a candidate has to come below this part of the default's time
CYCLES = 1 << 18  # a GPU waits these at first, some 0.15 ms, while the host prepares a call
MOST_CYCLES = 1 << 25


class Timer:
    """Times one call at a time, in seconds, with the caches cold.

    On a GPU events are the clock. After the overwriting the device waits for as long as the host
    takes to prepare the call. Without that the host would be timed, which takes ten times as long
    as the smaller kernels.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(
            _bytes_to_overwrite(device) // 4, dtype=torch.int32, device=device
        )
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


def _bytes_to_overwrite(device: torch.device) -> int:
    """Four times the L2 cache of a GPU; on a CPU 64 MiB, more than most have for two cores."""
    if device.type == "cpu":
        return 64 << 20
    properties = torch.cuda.get_device_properties(device)
    return 4 * (getattr(properties, "L2_cache_size", 0) or 64 << 20)


def take_turns(
    timer: Timer, runs: Sequence[Callable[[int], object]], rounds: int
) -> list[list[float]]:
    """The times of each run by round; each is called with the number of the round.

    The first of a round changes from round to round.
    """
    times: list[list[float]] = [[] for _ in runs]
    for round_ in range(rounds):
        for i in range(len(runs)):
            at = (i + round_) % len(runs)
            times[at].append(timer(partial(runs[at], round_)))
    return times


def is_faster(times: Sequence[float], default: Sequence[float]) -> bool:
    """True if faster by more than noise: in the median of the rounds and in three quarters."""
    ratios = [one / other for one, other in zip(times, default, strict=True)]
    return median(ratios) <= FASTER and quantiles(ratios, n=4, method="inclusive")[2] < 1.0
