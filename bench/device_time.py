"""Time of the host and time of the device, apart from each other.

A step of a layer takes the longer of two times: the host prepares its launches, and the device runs
them. ``HostTimer`` and ``DeviceTimer`` are timers of ``interleave.measure`` that see one of the two
alone. On a CPU, where they cannot be told apart, both read the clock around the calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from contestants import Entry
from interleave import no_collections

FIRST_CYCLES = 1 << 22  # some 2 ms of a GPU
MOST_CYCLES = 1 << 28  # some 140 ms
LEAD = 1 << 16  # some 30 us, in which the host launches a graph
HOST_CALLS = 10  # steps that the host enqueues between two readings of its clock
SETS = 4  # batches that take turns
MIN_CALLS = 8  # least number of calls in a graph, beside whose times that of its launch is small


class WaitsForDevice(RuntimeError):
    """A call made the host wait for the device, so it has no time of the host alone."""


class CaptureFailed(RuntimeError):
    """A graph could not be captured; the state of CUDA in this process is unknown from then on."""


class HostTimer:
    """Times how long the host takes to enqueue calls, while the device is held busy.

    ``torch.cuda._sleep`` occupies the device, so none of the calls is run before all of them are
    enqueued, and a fast device cannot speed the host up or slow it down. A GPU's queue holds about
    1000 launches: beyond that the host waits.

    Args:
        device: the device of the calls.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cycles: dict[Callable, int] = {}  # for each function, enough of them

    def __call__(self, run: Callable[[], object], calls: int) -> float:
        """Return the seconds that the host takes for one call.

        Raises:
            WaitsForDevice: the calls ended after the longest time for which the device is held.
        """
        if self._device.type == "cpu":
            return _seconds(run, calls) / calls
        cycles = self._cycles.get(run, FIRST_CYCLES)
        while True:
            torch.cuda.synchronize(self._device)
            torch.cuda._sleep(cycles)
            held = torch.cuda.Event()
            held.record()
            seconds = _seconds(run, calls)
            outlasted = held.query()
            torch.cuda.synchronize(self._device)
            if not outlasted:
                self._cycles[run] = cycles
                return seconds / calls
            if cycles >= MOST_CYCLES:
                raise WaitsForDevice(f"{calls} calls waited for the device, or took too long")
            cycles *= 2

    def fits(self, run: Callable[[], object], calls: int) -> bool:
        """True if the calls can be timed; False if they wait for the device."""
        run()  # the first call may compile
        try:
            self(run, calls)
        except WaitsForDevice:
            return False
        return True


class DeviceTimer:
    """Times how long the device takes for the calls of a ``Recorded`` function.

    Events are the clock. The device is held before the first one until the host has launched the
    graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, run: Recorded, calls: int) -> float:
        """Return the seconds that the device takes for one of the recorded calls."""
        if self._device.type == "cpu":
            return _seconds(run, calls) / (calls * run.n_calls)
        start, end = self._events
        torch.cuda.synchronize(self._device)
        torch.cuda._sleep(LEAD)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize(self._device)
        return start.elapsed_time(end) / 1e3 / (calls * run.n_calls)


class Recorded:
    """Calls that are made one after the other: as one CUDA graph, so that the host has no part.

    Each call should have inputs of its own, several times as large as the caches together: else a
    later call finds in the caches what an earlier one has read.

    Args:
        calls: functions, such as a step of a layer for each set of inputs. They must not wait for
            the device. Their results are freed at once.
        device: the device of the calls.

    Attributes:
        n_calls: number of calls that are made, each function several times if there are few.

    Raises:
        CaptureFailed: a call does what no graph can hold. What a call raises by itself comes as is.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], device: torch.device) -> None:
        repeats = -(-MIN_CALLS // len(calls)) if device.type == "cuda" else 1
        self._calls = [*calls] * repeats
        self.n_calls = len(self._calls)
        self._graph = _graph(calls, self._calls) if device.type == "cuda" else None

    def __call__(self) -> None:
        """Make all calls; on a GPU, launch the graph."""
        if self._graph is None:
            for call in self._calls:
                call()
        else:
            self._graph.replay()


def batches(
    x: torch.Tensor, grad: torch.Tensor, count: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return a batch and others like it, with random numbers of their own."""
    others = [
        (torch.randn_like(x, requires_grad=False), torch.randn_like(grad)) for _ in range(1, count)
    ]
    return [(x, grad), *((a.requires_grad_(True), b) for a, b in others)]


def training_steps(
    entry: Entry, sets: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[Callable[[], object]]:
    """Return a function for each batch that computes its outputs and all its gradients.

    The gradients are returned, not kept in ``.grad``: a graph would add to the same memory again.
    """
    trained = entry.trainable()

    def step(x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(entry.layer(x), [x, *trained], grad)

    return [partial(step, *one) for one in sets]


def _graph(
    different: Sequence[Callable[[], object]], calls: Sequence[Callable[[], object]]
) -> torch.cuda.CUDAGraph:
    """Capture calls. torch.cuda.graph would also empty the cache of the allocator each time."""
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, loads and allocates what no capture may
            for call in different:
                call()
        torch.cuda.synchronize()
        try:
            with no_collections():  # a collection could free another graph, which disturbs
                graph.capture_begin()
                for call in calls:
                    call()
                graph.capture_end()
        except Exception as error:
            raise CaptureFailed(f"{type(error).__name__}: {error}") from error
    torch.cuda.current_stream().wait_stream(stream)
    return graph


@cache
def _capture_stream() -> torch.cuda.Stream:
    """Return the one stream of all captures: every stream has memory and workspaces of its own."""
    return torch.cuda.Stream()


def _seconds(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start
