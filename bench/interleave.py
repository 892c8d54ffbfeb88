"""Interleaved timing of several functions, and the transfer of durations to pytest-benchmark."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a table of old results needs no torch
    import torch

MIN_ROUNDS = 7
# A contestant that is SLOW times slower than the median one runs in fewer rounds, so that it takes
# at most SLOW_SHARE of the time.
SLOW = 5.0
SLOW_SHARE = 0.25


@dataclass(frozen=True)
class Contestant:
    """Something to time.

    Attributes:
        name: key in the results.
        run: the timed call. Its result is freed outside of the timed part.
        reset: a function that is called after each run, outside of the timed part.
        within: returns a context in which it runs, such as one that forces a backend. It is entered
            outside of the timed part.
        most: largest number of its rounds; None for all rounds.
    """

    name: str
    run: Callable[[], object]
    reset: Callable[[], None] = lambda: None
    within: Callable[[], AbstractContextManager] = nullcontext
    most: int | None = None


Durations = dict[str, dict[int, float]]  # name -> round -> seconds
# Calls a function so many times, and returns the seconds of one call.
Timer = Callable[[Callable[[], object], int], float]


def order(n: int, round_: int) -> list[int]:
    """Return the order of n contestants in a round, as a row of a Williams square.

    If one fixed order were rotated, each contestant would always run after the same neighbor, with
    the caches and the heap as that neighbor left them. In a Williams square each contestant follows
    every other one equally often, and starts equally often, over n rounds (2n for odd n).
    """
    zigzag = [(k + 1) // 2 if k % 2 else -(k // 2) for k in range(n)]
    row = [(position + round_) % n for position in zigzag]
    return row[::-1] if n % 2 and (round_ // n) % 2 else row


def measure(
    contestants: Sequence[Contestant],
    *,
    rounds: int,
    seconds: float,
    synchronize: Callable[[], None] = lambda: None,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    timer: Timer | None = None,
) -> Durations:
    """Time all contestants in turn, round after round.

    Args:
        contestants: the contestants, with unique names.
        rounds: largest number of rounds.
        seconds: approximate time to take, but at least ``MIN_ROUNDS`` rounds are run (or
            ``rounds`` if that is less).
        synchronize: a function that waits until the device is idle, called before each reading of
            the clock.
        calls: number of calls between two readings of the clock. A duration is the time of one
            call. The default is 1.
        clock: a function that returns the time in seconds.
        timer: what a duration is; None for the time between two readings of the clock.

    Returns:
        The seconds of each contestant, by round.
    """

    def by_clock(run: Callable[[], object], calls: int) -> float:
        synchronize()
        start = clock()
        for _ in range(calls):
            result = run()
        synchronize()
        duration = (clock() - start) / calls
        del result
        return duration

    def once(contestant: Contestant) -> float:
        with contestant.within():
            duration = (timer or by_clock)(contestant.run, calls)
        contestant.reset()
        return duration

    def cost(contestant: Contestant) -> float:
        start = clock()
        duration = once(contestant)
        # a timer may take longer than what it times
        return clock() - start if timer else calls * duration

    with no_collections():
        costs = {c.name: cost(c) for c in contestants}  # also the warm-up
        for c in contestants:
            if costs[c.name] < calls:  # the first call includes allocations, plans and caches
                costs[c.name] = cost(c)
        most = {c.name: c.most for c in contestants if c.most is not None}
        n_rounds, turns = schedule(costs, rounds, seconds, most)
        durations: Durations = {c.name: {} for c in contestants}
        for round_ in range(n_rounds):
            for i in order(len(contestants), round_):
                name = contestants[i].name
                if round_ in turns[name]:
                    durations[name][round_] = once(contestants[i])
    return durations


def schedule(
    estimates: dict[str, float], rounds: int, seconds: float, most: dict[str, int] | None = None
) -> tuple[int, dict[str, frozenset[int]]]:
    """Choose the number of rounds, and the rounds in which each contestant runs.

    Slow contestants run in few rounds, spread evenly, so that the others can run in many.

    Args:
        estimates: seconds that a turn of each contestant takes.
        rounds: largest number of rounds.
        seconds: approximate time to take.
        most: largest number of rounds of some contestants.
    """
    limit = SLOW * median(estimates.values())
    fast = sum(t for t in estimates.values() if t <= limit)
    affordable = int((1 - SLOW_SHARE) * seconds / fast) if fast else rounds
    n_rounds = min(rounds, max(MIN_ROUNDS, affordable))
    turns = {}
    for name, estimate in estimates.items():
        n = n_rounds
        if estimate > limit:
            n = min(n_rounds, max(2, int(SLOW_SHARE * seconds / estimate)))
        n = min(n, (most or {}).get(name, n))
        turns[name] = frozenset((2 * i + 1) * n_rounds // (2 * n) for i in range(n))
    return n_rounds, turns


def ratios(durations: Durations, name: str, floor: str) -> list[float]:
    """Divide the duration of ``name`` by that of ``floor`` for each round in which both ran."""
    ours, theirs = durations[name], durations[floor]
    return [ours[r] / theirs[r] for r in sorted(ours.keys() & theirs.keys())]


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the lower and the upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return middle, low, high


@contextmanager
def no_collections() -> Iterator[None]:
    """Turn the garbage collector off, because a collection would fall on a random contestant."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class ReplayClock:
    """A clock that replays measured durations through pytest-benchmark.

    pytest-benchmark finishes timing one function before it starts the next, so a slow minute of the
    machine falls on one contestant alone. Ratios need interleaved contestants. ``measure`` runs
    them so, and each test then hands its durations to the plugin, which makes its statistics,
    tables and files.

    The replay is exact. ``pedantic`` neither calibrates nor warms up unless asked, and with one
    iteration a round's duration is ``timer() - timer()`` around one call of the target. Here the
    timer reads a clock that only the target moves. The clock is set back to zero before each round,
    so that the difference is the measured duration to the last bit.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def read(self) -> float:
        """Return the time; this method is the timer of pytest-benchmark."""
        return self._now

    def replay(self, benchmark, durations: Sequence[float]) -> None:
        """Record durations, in seconds, as the results of a ``benchmark`` fixture."""
        source = itertools.cycle(durations)  # --benchmark-cprofile makes an additional call

        def back_to_zero() -> None:
            self._now = 0.0

        def wait() -> None:
            self._now = next(source)

        benchmark.pedantic(wait, setup=back_to_zero, rounds=len(durations), iterations=1)


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Return a function that waits until a device is idle."""
    if device.type == "cuda":
        import torch

        return lambda: torch.cuda.synchronize(device)
    return lambda: None
