"""Parts of a section, and contests: several contestants timed in turn, a line for each."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from contestants import SHAPES, Shape, default_shapes
from device_time import HOST_CALLS, SETS, CaptureFailed, DeviceTimer, HostTimer, Recorded
from interleave import Contestant, Timer, measure
from sizes import GPU

from .lines import Writer

Part = tuple[str, Callable[[], None]]


@dataclass(frozen=True)
class Setting:
    """Device and sizes of a run.

    Attributes:
        device: the device that is measured.
        dtype: dtype of weights and rows.
        shapes: layers of the sections of layers.
        rows: numbers of rows in the section of host times, through a layer of ``width`` features.
        width: features and outputs of that layer, and features of the rows of kernels.
        bulk: rows that kernels work on.
        linears: input features of all layers of a model.
        model: a key of models.MODELS.
        copied: bytes of the large copy.
        sets: sets of inputs that take turns.
        variants: largest number of tiles of one kernel besides the default.
        rounds: largest number of rounds.
        seconds: approximate time of a section.
    """

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    width: int
    bulk: int
    linears: tuple[int, ...]
    model: str
    copied: int
    sets: int
    variants: int
    rounds: int
    seconds: float


def setting(device: str, seconds: float) -> Setting:
    """Return the setting of a device type, for a section of so many seconds."""
    if device == "cuda":
        return Setting(
            device=torch.device("cuda", 0),
            dtype=torch.bfloat16,
            shapes=default_shapes(torch.device("cuda")),
            rows=(16, 512, 2048, 8192),
            width=GPU.features,
            bulk=GPU.rows,
            linears=GPU.linears,
            model="quarter",
            copied=1 << 30,
            sets=SETS,
            variants=10,
            rounds=60,
            seconds=seconds,
        )
    return Setting(
        device=torch.device("cpu"),
        dtype=torch.float32,
        shapes=tuple(Shape(64, 16 * (i + 1), 8) for i in range(len(SHAPES[:2]))),
        rows=(4, 16),
        width=256,
        bulk=32,
        linears=(64, 128),
        model="tiny",
        copied=1 << 12,
        sets=2,
        variants=2,
        rounds=3,
        seconds=0.01,
    )


@dataclass
class Rival:
    """A contestant of a contest, before it is built.

    Attributes:
        name: key in the lines.
        label: name for a reader.
        make: returns the function to time. For a contest on the device it returns a function for
            each set of inputs.
        reset: called after each of its turns.
        within: returns a context in which it is built and runs, such as one that forces a backend.
        most: largest number of its rounds, or None.
        facts: further facts of its line.
    """

    name: str
    label: str
    make: Callable[[], Any]
    reset: Callable[[], None] = lambda: None
    within: Callable[[], AbstractContextManager] = nullcontext
    most: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def on_device(
    writer: Writer, part: str, rivals: Sequence[Rival], setting: Setting, seconds: float, **facts
) -> None:
    """Time rivals on the device alone, as CUDA graphs that go through all sets of inputs."""

    def record(rival: Rival) -> Recorded:
        return Recorded(rival.make(), setting.device)

    timer = DeviceTimer(setting.device)
    _contest(writer, part, rivals, setting, seconds, record, timer, 1, facts | {"clock": "device"})


def of_host(
    writer: Writer, part: str, rivals: Sequence[Rival], setting: Setting, seconds: float, **facts
) -> None:
    """Time what the host takes to enqueue the calls of rivals, while the device is held busy."""
    timer, calls = HostTimer(setting.device), CALLS[setting.device.type]

    def ready(rival: Rival) -> Callable[[], object]:
        run = rival.make()
        if not timer.fits(run, calls):
            raise RuntimeError("waits for the device, so it has no time of the host alone")
        return run

    _contest(writer, part, rivals, setting, seconds, ready, timer, calls, facts | {"clock": "host"})


def by_clock(
    writer: Writer,
    part: str,
    rivals: Sequence[Rival],
    setting: Setting,
    seconds: float,
    calls: int = 1,
    **facts,
) -> None:
    """Time rivals from an idle device to an idle device."""

    def ready(rival: Rival) -> Callable[[], object]:
        run = rival.make()
        run()  # one that fails, for want of memory or so, is left out before any is timed
        rival.reset()
        return run

    _contest(writer, part, rivals, setting, seconds, ready, None, calls, facts | {"clock": "both"})


# steps between two readings of the clock
CALLS = {"cuda": HOST_CALLS, "cpu": 2}


def _contest(
    writer: Writer,
    part: str,
    rivals: Sequence[Rival],
    setting: Setting,
    seconds: float,
    ready: Callable[[Rival], Any],
    timer: Timer | None,
    calls: int,
    facts: dict[str, Any],
) -> None:
    """Time rivals in turn, and write the figure of each. One that fails is left out.

    Raises:
        CaptureFailed: this process can measure nothing more.
    """
    contestants, kept = [], []
    for rival in rivals:
        try:
            with rival.within():
                run = ready(rival)
        except CaptureFailed:
            raise
        except Exception as error:
            writer.write("failed", part=part, name=rival.name, why=reason(error))
            settle(setting.device)
        else:
            contestants.append(Contestant(rival.name, run, rival.reset, rival.within, rival.most))
            kept.append(rival)
    if not contestants:
        return
    durations = measure(
        contestants,
        rounds=setting.rounds,
        seconds=seconds,
        synchronize=lambda: settle(setting.device),
        calls=calls,
        timer=timer,
    )
    for rival in kept:
        first = {"first": kept[0].name}
        more = first | facts | rival.facts
        writer.figure(part, rival.name, rival.label, durations[rival.name], **more)


def settle(device: torch.device) -> None:
    """Wait until the device is idle; raises once more an error that spoiled the process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reason(error: BaseException) -> str:
    """Return the last line of an error with its type."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"[:300]


def run_parts(
    parts: Iterator[Part], writer: Writer, device: torch.device, until: float, skip: set[str]
) -> None:
    """Run the parts of a section until its time is over. A part that fails is left out.

    Args:
        parts: the parts, the most important one first.
        writer: takes the lines.
        device: the device that is measured.
        until: time.monotonic() from which on no part is started.
        skip: parts that an earlier process has begun.

    Raises:
        RuntimeError: the device cannot be used any more.
        CaptureFailed: likewise.
    """
    gc.collect()
    gc.freeze()  # the imported modules need not be looked through before each contest
    for part, run in parts:
        if part in skip:
            continue
        if time.monotonic() > until:
            writer.write("failed", part=part, name="", why="no time left")
            continue
        writer.write("begun", part=part)
        try:
            run()
        except CaptureFailed as error:
            writer.write("failed", part=part, name="", why=reason(error))
            raise
        except Exception as error:
            writer.write("failed", part=part, name="", why=reason(error))
            settle(device)
