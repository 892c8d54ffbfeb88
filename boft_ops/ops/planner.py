"""The plan of a layer on a device: its stages, and the side that is rotated, with measurements."""

from __future__ import annotations

import math

import torch

from .._runtime import tuned
from .._runtime.tuned import Choice, ShapeClass, Tunable
from .stages import Stage, plan

# A CPU rotates W instead of x from this size of a group and this many rows an output on.
WEIGHT_SIDE_SIZE, WEIGHT_SIDE_ROWS = 65, 8


def _class_of(
    x: torch.Tensor, n_factors: int, block_size: int, outputs: int | None
) -> tuple[tuple, tuple]:
    rows = x.shape[0] if x.dim() == 2 else math.prod(x.shape[:-1])
    return (n_factors, block_size), (rows, x.shape[-1], outputs)


def _accept(device: str, structure: dict[str, int], choice: Choice) -> None:
    stages, weight_side = _numbers(choice)
    if choice.backend or choice != plan_choice(stages, weight_side):
        raise ValueError(f"not a plan: {choice}")
    if not 1 <= stages <= structure["n_factors"]:
        raise ValueError(f"not a plan of {structure['n_factors']} factors: {choice}")


PLAN = tuned.register(
    Tunable(
        "plan",
        ShapeClass(("n_factors", "block_size"), ("rows", "features", "outputs"), _class_of),
        _accept,
    )
)


def plan_choice(stages: int, weight_side: bool) -> Choice:
    """A plan as the tuner writes it down."""
    return Choice("", (("stages", stages), ("weight_side", int(weight_side))))


def default_plan(n_factors: int, block_size: int, device: str, rows: int, outputs: int) -> Choice:
    """The plan of a layer of which nothing was measured."""
    stages = plan(n_factors, block_size, device)
    return plan_choice(len(stages), rotates_weight(stages, device, rows, outputs))


def _numbers(choice: Choice) -> tuple[int, bool]:
    config = dict(choice.config)
    return config.get("stages", 0), config.get("weight_side") == 1


def plan_for(x: torch.Tensor, n_factors: int, block_size: int) -> tuple[Stage, ...]:
    """``plan`` for rows x (..., d), with the number of stages that was measured to be best."""
    return layer_plan(x, n_factors, block_size, None)[0]


def layer_plan(
    x: torch.Tensor, n_factors: int, block_size: int, outputs: int | None
) -> tuple[tuple[Stage, ...], bool]:
    """The stages for a layer's rows, and True if its weight is rotated in the place of them.

    Args:
        x: rows (..., d).
        n_factors, block_size: of the butterfly.
        outputs: rows of the weight (outputs, d); None where no weight can be rotated. A measurement
            in favor of the weight then says nothing, nor in a compiled graph, which is made for any
            number of rows.
    """
    eager = not torch.compiler.is_compiling()
    choice = tuned.measured(PLAN, x, (x, n_factors, block_size, outputs), eager)
    device = x.device.type
    if choice is not None:
        n_stages, weight_side = _numbers(choice)
        if not weight_side or (outputs is not None and eager):
            return plan(n_factors, block_size, device, n_stages), weight_side
    stages = plan(n_factors, block_size, device)
    if outputs is None or not eager:
        return stages, False
    return stages, rotates_weight(stages, device, x.numel() // x.shape[-1], outputs)


def rotates_weight(stages: tuple[Stage, ...], device: str, rows: int, outputs: int) -> bool:
    """True if an unmeasured layer rotates W instead of x.

    By the bytes of docs/tuning.md it does where that halves what the rotation of x moves in a
    training step, 5 rows d numbers: 4 outputs d + 2 rows d, so from 8 rows an output on. A CPU
    rotates groups of up to 64 features inside its matrix product, which those bytes do not count.
    On an H200 the two sides of BOFT(2, 8) were not separable at 8192 rows of 4096 features, and W
    took longer for 512 of them (bench/results/nvidia-h200/decide.jsonl).
    """
    large = len(stages) == 1 and stages[0].size >= WEIGHT_SIDE_SIZE
    return large and device == "cpu" and rows >= WEIGHT_SIDE_ROWS * outputs
