"""The layers that are compared by host time and by the clock: sections "host" and "layers".

``WAYS`` lists them. A layer that is computed in another way becomes one more row. A forced backend
is checked in every call, which takes the host some time; so the default has a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from contestants import FLOOR, LORA, PEFT_BOFT, Job, Shape, batch, build, frozen
from correctness import check_merged

from boft_ops._runtime import backend

from .contest import CALLS, Part, Rival, Setting, by_clock, of_host
from .lines import Writer


class Way(NamedTuple):
    """A layer, and the way in which it is computed.

    Attributes:
        name: key in the lines.
        layer: one of contestants.NAMES.
        how: the way in words, for the label; "" for the default.
        within: returns a context that makes the layer be computed so.
        backends: the layer takes part if all of these serve it on the device.
        most: largest number of rounds, or None.
    """

    name: str
    layer: str
    how: str = ""
    within: Callable[[], AbstractContextManager] = nullcontext
    backends: tuple[str, ...] = ()
    most: int | None = None


OURS = "boft-2-8"


def _forced(name: str) -> Way:
    return Way(f"{OURS} {name}", OURS, f"forced to {name}", partial(backend.force, name), (name,))


WAYS = (
    Way(FLOOR, FLOOR),
    Way(LORA, LORA),
    Way("peft-oft", "peft-oft"),
    Way(OURS, OURS),
    *map(_forced, ("triton", "cuda", "cpu")),
    Way(PEFT_BOFT, PEFT_BOFT, most=3),
)


def ways(device: torch.device) -> list[Way]:
    """List the rows of ``WAYS`` that can be computed on a device."""
    able = backend.PREFERENCE[device.type]
    rotate = backend.ops()["rotate"]
    return [
        way
        for way in WAYS
        if all(name in able and name not in rotate.unavailable for name in way.backends)
    ]


def host_parts(setting: Setting, writer: Writer) -> Iterator[Part]:
    """Yield the host's time of a training step, then loops of steps, for each number of rows.

    Last come loops in float32, for the least and the largest number.
    """
    seconds = setting.seconds / (2 * len(setting.rows) + 2)
    for rows in setting.rows:
        shape = Shape(setting.width, setting.width, rows)
        part = f"enqueued, {shape}"
        yield part, partial(_host, writer, part, shape, setting, seconds, of_host)
    for rows in setting.rows:
        shape = Shape(setting.width, setting.width, rows)
        loop = partial(by_clock, calls=CALLS[setting.device.type])
        part = f"loop, {shape}"
        yield part, partial(_host, writer, part, shape, setting, seconds, loop)
    wide = replace(setting, dtype=torch.float32)
    for rows in (setting.rows[0], setting.rows[-1]):
        shape = Shape(setting.width, setting.width, rows)
        part = f"loop in float32, {shape}"
        yield part, partial(_host, writer, part, shape, wide, seconds, loop)


def layer_parts(setting: Setting, writer: Writer) -> Iterator[Part]:
    """Yield the time of a training step of each shape, from an idle device to an idle device."""
    for shape in setting.shapes:
        seconds = setting.seconds / len(setting.shapes)
        yield str(shape), partial(_layers, writer, shape, setting, seconds)


def _host(
    writer: Writer, part: str, shape: Shape, setting: Setting, seconds: float, contest: Callable
) -> None:
    def rival(way: Way, job: Callable[[], Job]) -> Rival:
        def make() -> Callable[[], None]:
            made = job()

            def step() -> None:
                made.reset()  # as an optimizer does it: gradients are not added up
                made.both()

            return step

        return Rival(way.name, label(way), make, within=way.within, most=way.most)

    rivals = [rival(way, job) for way, job in jobs(shape, setting, check=False)]
    contest(writer, part, rivals, setting, seconds)


def _layers(writer: Writer, shape: Shape, setting: Setting, seconds: float) -> None:
    rivals = []
    for way, job in jobs(shape, setting, check=True):
        made: list[Job] = []  # by the time of its first turn

        def make(job=job, made=made) -> Callable[[], None]:
            made.append(job())
            return made[0].both

        def reset(made=made) -> None:
            made[0].reset()

        rivals.append(Rival(way.name, label(way), make, reset, within=way.within, most=way.most))
    by_clock(writer, str(shape), rivals, setting, seconds)


def jobs(shape: Shape, setting: Setting, *, check: bool) -> Iterator[tuple[Way, Callable[[], Job]]]:
    """Yield each way with a function that builds its layer, all over one weight and batch.

    With ``check`` that function raises AssertionError if the results of a layer of ours are wrong.
    """
    base = frozen(shape, setting.device, setting.dtype)
    x, grad = batch(shape, setting.device, setting.dtype)

    def job(way: Way) -> Job:
        made = Job(build(way.layer, base), x, grad)
        if check and way.layer == OURS:
            check_merged(made.entry.layer, x, grad)
        return made

    for way in ways(setting.device):
        yield way, partial(job, way)


LABELS = {
    FLOOR: "frozen nn.Linear",
    LORA: "PEFT LoRA r=16",
    "peft-oft": "PEFT OFT b=8 (default)",
    OURS: "BOFT(2,8)",
    PEFT_BOFT: "PEFT BOFT b=8, without its extension",
}


def label(way: Way) -> str:
    """Name of a way in tables."""
    return f"{LABELS[way.layer]}, {way.how}" if way.how else LABELS[way.layer]
