"""Hands measured durations to pytest-benchmark, and keeps them for the summary of the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from contestants import SMALL_SHAPES, Shape
from interleave import ReplayClock, summary
from operators import FORWARD

CLOCK = ReplayClock()
RECORDS = pytest.StashKey[list[dict[str, Any]]]()

# Seconds that a large shape takes beside its rounds: building, checks, memory, slow contestants.
SECONDS_AROUND = 15.0


def record(
    config: pytest.Config, benchmark, heading: str, durations: Sequence[float], **info: Any
) -> None:
    """Replay the durations of one contestant through pytest-benchmark.

    The row has the contestant's label as its name, because the label says what was measured, such
    as the number of factors that PEFT's BOFT falls back to.

    Args:
        config: keeps the record until the end of the session.
        benchmark: the fixture of pytest-benchmark.
        heading: title of the plugin's table.
        durations: seconds, one for each round.
        info: the extra_info of the result, with ``label``.
    """
    benchmark.group, benchmark.name = heading, info["label"]
    benchmark.extra_info.update(info)
    CLOCK.replay(benchmark, durations)
    median, q1, q3 = summary(durations)
    stats = {"data": list(durations), "median": median, "q1": q1, "q3": q3}
    config.stash.setdefault(RECORDS, []).append({"extra_info": info, "stats": stats})


def layer_seconds(shape: Shape, direction: str, seconds: float) -> float:
    """Share of the time limit that a shape and direction of the layer suite gets.

    What counts is a training step of a large layer; forward gets half as much, and small layers
    have their rounds in a quarter of the time.
    """
    share = 0.25 if shape in SMALL_SHAPES else 1.0
    return seconds * share * (0.5 if direction == FORWARD else 1.0)


def expected_seconds(items: Iterable[pytest.Item], seconds: float) -> float:
    """Estimate how long benchmarks will take, at most: many end earlier, by their rounds."""
    parts: dict[tuple, float] = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "shape" in params:
            shape, direction = Shape.parse(params["shape"]), params["direction"]
            parts[shape, direction] = layer_seconds(shape, direction, seconds)
            if shape not in SMALL_SHAPES:
                parts[shape, "around"] = SECONDS_AROUND
        elif "group" in params:
            parts[params["group"], params["direction"]] = seconds / 10
        elif "model" in params:
            parts["model", params["model"]] = seconds + SECONDS_AROUND
    return sum(parts.values())
