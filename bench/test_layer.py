"""Benchmark of whole layers, forward and forward + backward.

    pytest bench/ --benchmark-only

The contestants are the frozen layer, PEFT's adapters and this package's. One run times all
contestants of a shape and direction interleaved (interleave.py), even if -k selects some of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from contestants import (
    FLOOR,
    OURS,
    Job,
    Shape,
    batch,
    build,
    default_shapes,
    frozen,
    names,
)
from correctness import check_gradients, check_merged
from definitions import check_definition
from interleave import Contestant, Durations, measure, ratios, summary, synchronizer
from memory import peak_bytes, saved_bytes
from recording import CLOCK, layer_seconds, record

BOTH = "forward+backward"
DIRECTIONS = ("forward", BOTH)


@dataclass
class Memory:
    """Bytes saved for backward, and the peak of forward and backward in bytes."""

    saved: int
    peak: int


class Contest:
    """The contestants at one shape. A direction is measured once, when it is first requested.

    Attributes:
        left_out: names of the contestants that ran out of memory.
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, options) -> None:
        self.shape, self.device, self.options = shape, device, options
        self.jobs: dict[str, Job] = {}
        self.memory: dict[str, Memory] = {}
        self.left_out: list[str] = []
        base, (x, grad) = frozen(shape, device, dtype), batch(shape, device, dtype)
        for name in names(shape, options.getoption("extras")):
            try:
                _check(name, device, dtype)
                job = Job(build(name, base), x, grad)
                if name in OURS:
                    check_merged(job.entry.layer, x, grad)
                self.memory[name] = self._memory(job)
            except torch.OutOfMemoryError:
                if name == FLOOR:  # without it there is nothing to compare with
                    raise
                self.left_out.append(name)
                _say(options, f"{shape}: {name} needs more memory than there is, and is left out")
            else:
                self.jobs[name] = job
            job = x.grad = None  # frees the memory of a contestant that was left out
        self._durations: dict[str, Durations] = {}

    def durations(self, direction: str) -> Durations:
        """Return the durations of all contestants, measuring them on the first call."""
        if direction not in self._durations:
            _say(self.options, f"measuring {self.shape} {direction}")
            self._durations[direction] = measure(
                [Contestant(n, job.runner(direction), job.reset) for n, job in self.jobs.items()],
                rounds=self.options.getoption("rounds"),
                seconds=layer_seconds(self.shape, direction, self.options.getoption("seconds")),
                synchronize=synchronizer(self.device),
            )
        return self._durations[direction]

    def _memory(self, job: Job) -> Memory:
        # The first call also makes handles, plans and workspaces, which are made only once.
        saved = saved_bytes(job.forward, job.entry.state())
        peak = peak_bytes(job.both, self.device)
        job.reset()
        return Memory(saved, peak)

    def facts(self, name: str, direction: str) -> dict:
        """Collect the extra_info of a result."""
        entry, durations = self.jobs[name].entry, self.durations(direction)
        ratio, low, high = summary(ratios(durations, name, FLOOR))
        adapter = sum(t.nbytes for t in entry.state()) - sum(
            t.nbytes for t in self.jobs[FLOOR].entry.state()
        )
        return {
            "suite": "layer",
            "group": str(self.shape),
            "contestant": name,
            "label": entry.label,
            "note": entry.note,
            "direction": direction,
            **self.shape._asdict(),
            "ratio": ratio,
            "ratio_q1": low,
            "ratio_q3": high,
            "overhead": ratio - 1,
            "saved_bytes": self.memory[name].saved,
            "peak_bytes": self.memory[name].peak,
            "adapter_bytes": adapter,
            "trainable": sum(p.numel() for p in entry.trainable()),
            "threads": torch.get_num_threads(),
            "rounds": sorted(durations[name]),
            **({"left_out": self.left_out} if self.left_out else {}),
        }


@cache
def _check(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse to time a layer whose results are wrong; raises AssertionError."""
    if name in OURS:
        m, b, _, scale = OURS[name]
        check_gradients(m, b, device, dtype, scale)
    else:
        check_definition(name, device, dtype)


def _say(config: pytest.Config, line: str) -> None:
    """Print a line past pytest's capture, because measuring a shape takes a minute in silence."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(line)


@pytest.fixture(scope="session")
def contest(device: torch.device, dtype: torch.dtype, pytestconfig: pytest.Config):
    """Return a function that makes the contest of a shape, once for all tests."""

    @cache
    def get(shape: str) -> Contest:
        return Contest(Shape.parse(shape), device, dtype, pytestconfig)

    return get


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    shapes = option("shapes") or default_shapes(option("device"))
    extras = option("extras")
    pairs = [(str(shape), name) for shape in shapes for name in names(shape, extras)]
    metafunc.parametrize(("shape", "name"), pairs)


@pytest.mark.timeout(0)  # the first test of a shape measures for all of them
@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layer(benchmark, contest, pytestconfig, shape: str, direction: str, name: str) -> None:
    contestants = contest(shape)
    if name in contestants.left_out:
        pytest.skip("out of memory")
    times = list(contestants.durations(direction)[name].values())
    facts = contestants.facts(name, direction)
    record(pytestconfig, benchmark, f"{shape} {direction}", times, **facts)
