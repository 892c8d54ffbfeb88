"""Models the cost of each plan of a layer by bytes, flops and launches (docs/tuning.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._runtime import dtypes, tuned
from ..ops.planner import PLAN, plan_choice, rotates_weight
from ..ops.stages import Stage, plan


class Machine(NamedTuple):
    """Bytes per second, flops per second by dtype, and seconds from one kernel to the next."""

    bytes: float
    flops: dict[str, float]
    launch: float

    def seconds(self, n_bytes: float, flops: float, dtype: str) -> float:
        """The larger of what the bytes and what the flops take, and a launch."""
        rate = self.flops.get(dtype, self.flops["float32"] / (2 if dtype == "float64" else 1))
        return max(n_bytes / self.bytes, flops / rate) + self.launch


# Two CPU cores with AVX2; an H100 by its data sheet. The ratios are those of stages.PASS_COST.
MACHINES = {
    "cpu": Machine(6.25e9, {"float32": 100e9}, 0.0),
    "cuda": Machine(3.43e12, {"bfloat16": 600e12, "float16": 600e12, "float32": 60e12}, 4e-6),
}


class Cost(NamedTuple):
    """Seconds of a training step of one layer, without its products with W.

    Attributes:
        stages: the plan.
        weight_side: False if x goes through the stages, True if W goes through the one stage.
        make: composing the stages, and the gradient of that.
        forward: passes over x, or over W.
        backward: those passes of the backward, with the gradients of the stages.
    """

    stages: tuple[Stage, ...]
    weight_side: bool
    make: float
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.make + self.forward + self.backward


def cost(
    rows: int, d: int, n: int, stages: Sequence[Stage], b: int, dtype: str,
    machine: Machine, weight_side: bool = False,
) -> Cost:  # fmt: skip
    """The modelled cost of one plan of a layer of d inputs and n outputs."""
    width = {"float64": 8, "float32": 4}.get(dtype, 2)

    def passes(count: int) -> float:
        return sum(
            machine.seconds(2 * count * d * width, 2 * count * d * s.size, dtype) for s in stages
        )

    make = sum(machine.seconds(12 * d * s.size, 6 * d * b * s.size, "float32") for s in stages)
    if weight_side:
        size = stages[0].size
        stage_grad = machine.seconds(2 * rows * d * width, 2 * rows * d * size, dtype)
        return Cost(tuple(stages), True, make, passes(n), passes(n) + stage_grad)
    again = passes(rows) * (len(stages) - 1) / len(stages)
    gradients = sum(
        machine.seconds(3 * rows * d * width, 4 * rows * d * s.size, dtype) for s in stages
    )
    return Cost(tuple(stages), False, make, passes(rows), again + gradients)


def plans(rows: int, d: int, n: int, m: int, b: int, dtype: str, device: str) -> list[Cost]:
    """Every number of stages that x can go through, then the one stage that W can go through."""
    machine = MACHINES[device]
    counts = range(1, m + 1)
    costs = [cost(rows, d, n, plan(m, b, device, count), b, dtype, machine) for count in counts]
    return [*costs, cost(rows, d, n, plan(m, b, device, 1), b, dtype, machine, True)]


def show(
    rows: int, d: int, n: int, m: int, b: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Print a line for each plan of BOFT(m, b) on a layer of d inputs and n outputs."""
    name, stages = dtypes.name_of(dtype), plan(m, b, device.type)
    default = plan_choice(len(stages), rotates_weight(stages, device.type, rows, n))
    best = None
    if device.type == "cpu" or torch.cuda.is_available():
        best = tuned.lookup(PLAN, device, dtype, (m, b), (rows, d, n))
    header = ("stages", "sizes", "side", "compose us", "forward us", "backward us", "total us", "")
    lines = [header]
    for one in plans(rows, d, n, m, b, name, device.type):
        this = plan_choice(len(one.stages), one.weight_side)
        marks = ["default"] * (this == default) + ["measured best"] * (this == best)
        marks += ["chosen"] * (this == (best or default))
        times = (one.make, one.forward, one.backward, one.total)
        sizes = " ".join(str(stage.size) for stage in one.stages)
        figures = (f"{1e6 * seconds:.1f}" for seconds in times)
        side = "weight" if one.weight_side else "in"
        lines.append((str(len(one.stages)), sizes, side, *figures, ", ".join(marks)))
    print(f"BOFT({m}, {b}), {d} -> {n}, {rows} rows, {name} on {device.type}; assumed rates")
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = (
            cell.ljust(w) if i in (1, 2, 7) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
