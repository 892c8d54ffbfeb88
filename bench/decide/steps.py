"""Section "steps": training steps of whole layers on the device alone, each as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

from contestants import FLOOR, LORA, Shape, batch, build, frozen, names
from device_time import batches, training_steps

from boft_ops._runtime import backend, tuned
from boft_ops.ops.planner import PLAN, plan_choice

from .contest import Part, Rival, Setting, on_device
from .lines import Writer
from .merged import MergedLayer
from .rivals import LABELS, OURS


class Step(NamedTuple):
    """A layer and the way in which its step is computed.

    Attributes:
        name: key in the lines.
        layer: one of contestants.NAMES.
        label: name for a reader.
        scaled: False to leave the trained scale out.
        keeps: True to multiply by a merged weight that is made once.
        within: returns a context that makes the layer be computed so.
    """

    name: str
    layer: str
    label: str
    scaled: bool = True
    keeps: bool = False
    within: Callable[[], AbstractContextManager] = nullcontext


def _side(
    weight: bool, stages: int = 1, **others: tuned.Choice
) -> Callable[[], AbstractContextManager]:
    return lambda: tuned.pinned(**{PLAN.name: plan_choice(stages, weight)}, **others)


STEPS = (
    Step(FLOOR, FLOOR, LABELS[FLOOR]),
    Step(LORA, LORA, LABELS[LORA]),
    Step("input side", OURS, "BOFT(2,8), x rotated", within=_side(False)),
    Step("merged", OURS, "BOFT(2,8), W rotated and scaled", within=_side(True)),
    Step(
        "input side, no scale",
        OURS,
        "BOFT(2,8) without scale, x rotated",
        False,
        within=_side(False),
    ),
    Step(
        "weight side, no scale",
        OURS,
        "BOFT(2,8) without scale, W rotated",
        False,
        within=_side(True),
    ),
    Step("merged, kept", OURS, "BOFT(2,8), W' kept", keeps=True),
    Step("boft-dense", "boft-dense", "BOFT(10,8)"),
    Step(
        "boft-dense in 3 stages",
        "boft-dense",
        "BOFT(10,8), three stages by C++",
        within=_side(False, 3, rotate=backend.CUDA, rotate_backward=backend.CUDA),
    ),
    Step("merged dense", "boft-dense", "BOFT(10,8), W rotated and scaled", within=_side(True, 2)),
)


def parts(setting: Setting, writer: Writer) -> Iterator[Part]:
    """Yield the steps of each shape."""
    for shape in setting.shapes:
        seconds = setting.seconds / len(setting.shapes)
        yield str(shape), partial(_measure, shape, setting, writer, seconds)


def _measure(shape: Shape, setting: Setting, writer: Writer, seconds: float) -> None:
    base = frozen(shape, setting.device, setting.dtype)
    x, grad = batch(shape, setting.device, setting.dtype)
    sets = batches(x, grad, setting.sets)

    def make(step: Step) -> list[Callable[[], object]]:
        entry = build(step.layer, base)
        if not step.scaled:
            entry.layer.scale_offset = None
        if step.keeps:
            entry.layer = MergedLayer(entry.layer)
        return training_steps(entry, sets)

    rivals = [
        Rival(step.name, step.label, partial(make, step), within=step.within)
        for step in STEPS
        if step.layer in names(shape)
    ]
    rivals.append(
        Rival("clone", "x.clone()", lambda: [lambda x=x: x.detach().clone() for x, _ in sets])
    )
    on_device(writer, str(shape), rivals, setting, seconds)
