"""Section "model": training steps of a whole model of the Llama architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from models import MODELS, base, build, group, text, training_step

from .contest import Part, Rival, Setting, by_clock
from .lines import Writer
from .rivals import LABELS

CONTESTANTS = ("lora-r16", "boft-2-8", "peft-boft")
STEPS = 12


def parts(setting: Setting, writer: Writer) -> Iterator[Part]:
    """Yield the one model of the setting."""
    part = group(setting.model)
    yield part, partial(_measure, part, setting, writer)


def _measure(part: str, setting: Setting, writer: Writer) -> None:
    model = base(setting.model, setting.device, setting.dtype)
    ids = text(setting.model, setting.device)

    def make(name: str) -> Callable[[], object]:
        step = training_step(build(name, model), ids)
        losses = [float(step()) for _ in range(2)]
        if not 0 < losses[0] < 20 or losses[1] == losses[0]:  # refuses NaN too
            raise RuntimeError(f"expected losses that move, got {losses}")
        return step

    rivals = [Rival(name, LABELS[name], partial(make, name)) for name in CONTESTANTS]
    few = replace(setting, rounds=min(STEPS, setting.rounds))
    by_clock(writer, part, rivals, few, setting.seconds, tokens=MODELS[setting.model].tokens)
