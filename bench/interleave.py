"""Timing several functions side by side, and handing the durations to pytest-benchmark."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles

import torch

MIN_ROUNDS = 7
# A contestant this many times slower than the median one runs in fewer rounds ...
SLOW = 5.0
# ... so that it takes at most this part of the time.
SLOW_SHARE = 0.25


@dataclass(frozen=True)
class Contestant:
    """Something to time.

    Attributes:
        name: key in the results.
        run: the timed call; what it returns is dropped outside of the timed part.
        reset: called after each run, outside of the timed part.
    """

    name: str
    run: Callable[[], object]
    reset: Callable[[], None] = lambda: None


Durations = dict[str, dict[int, float]]  # name -> round -> seconds


def order(n: int, round_: int) -> list[int]:
    """The order of n contestants in a round.

    Rotating one fixed order would leave each contestant behind the same neighbour, with the caches
    and the heap as that one left them. These are the rows of a Williams square: over n rounds (2n
    for odd n) everyone follows everyone else equally often, and starts equally often.
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
) -> Durations:
    """Time all contestants in turn, round after round.

    Args:
        contestants: who takes part; names are unique.
        rounds: at most so many.
        seconds: aim at taking about this long, in no fewer than ``MIN_ROUNDS`` rounds (or
            ``rounds``, if that is less).
        synchronize: waits until the device is idle; called before each reading of the clock.
        calls: so many in a row between two readings of the clock; a duration is that of one.
        clock: seconds.
    """

    def once(contestant: Contestant) -> float:
        synchronize()
        start = clock()
        for _ in range(calls):
            result = contestant.run()
        synchronize()
        duration = (clock() - start) / calls
        del result
        contestant.reset()
        return duration

    with _no_collections():
        estimates = {c.name: once(c) for c in contestants}  # also the warm-up
        for c in contestants:
            if estimates[c.name] < 1.0:  # the first call pays for allocations, plans, caches
                estimates[c.name] = once(c)
        n_rounds, turns = schedule(estimates, rounds, seconds / calls)
        durations: Durations = {c.name: {} for c in contestants}
        for round_ in range(n_rounds):
            for i in order(len(contestants), round_):
                name = contestants[i].name
                if round_ in turns[name]:
                    durations[name][round_] = once(contestants[i])
    return durations


def schedule(
    estimates: dict[str, float], rounds: int, seconds: float
) -> tuple[int, dict[str, frozenset[int]]]:
    """How many rounds there are, and in which of them each contestant runs.

    Slow ones run in a few rounds, spread evenly, so that the others can run in many.
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
        turns[name] = frozenset((2 * i + 1) * n_rounds // (2 * n) for i in range(n))
    return n_rounds, turns


def ratios(durations: Durations, name: str, floor: str) -> list[float]:
    """Duration of ``name`` over that of ``floor``, in each round in which both ran."""
    ours, theirs = durations[name], durations[floor]
    return [ours[r] / theirs[r] for r in sorted(ours.keys() & theirs.keys())]


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return middle, low, high


@contextmanager
def _no_collections() -> Iterator[None]:
    """The garbage collector would strike whichever contestant happens to run."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class ReplayClock:
    """Durations measured before, replayed through pytest-benchmark.

    pytest-benchmark times one function until it is done and only then the next, so that a minute in
    which the machine is slower falls on one contestant alone. Ratios need all of them interleaved:
    ``measure`` does that, and each test hands its own durations to the plugin, which keeps its
    statistics, tables and files.

    Sound by the plugin's own rules: ``pedantic`` neither calibrates nor warms up unless asked, and
    with one iteration a round's duration is ``timer() - timer()`` around one call of the target.
    Here the timer reads a clock that only the target moves, and that is set back to zero before
    each round, so that the difference is the measured duration to the last bit.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def read(self) -> float:
        """The timer to give to pytest-benchmark."""
        return self._now

    def replay(self, benchmark, durations: Sequence[float]) -> None:
        """Make the results of this ``benchmark`` fixture the given durations, in seconds."""
        source = itertools.cycle(durations)  # --benchmark-cprofile calls once more

        def back_to_zero() -> None:
            self._now = 0.0

        def wait() -> None:
            self._now = next(source)

        benchmark.pedantic(wait, setup=back_to_zero, rounds=len(durations), iterations=1)


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits for a device to be idle."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
