"""Prints the bytes and flops of each plan of a layer (docs/tuning.md)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch

from .._runtime import dtypes, tuned
from ..ops.planner import PLAN, default_plan, plan_choice
from ..ops.stages import Stage, plan

HEADER = ("stages", "sizes", "side", "MB", "GFLOP", "")


def work(
    rows: int, d: int, n: int, stages: Sequence[Stage], b: int, width: int, weight_side: bool
) -> tuple[int, int]:
    """Bytes and flops of a training step of a layer with a scale, without its products with W.

    Args:
        rows, d, n: rows of x, features, outputs.
        stages: the plan.
        b: block size.
        width: bytes of an element of x and of W.
        weight_side: True if W goes through the stages, False if x does.
    """
    size = sum(stage.size for stage in stages)
    count, others = len(stages), size - stages[0].size  # x meets stage 0 last
    if weight_side:  # W twice, forward and backward; then x and its gradient, and Gram matrices
        scale = 4 * rows * n  # a copy of the output, which is then read with its gradient
        passes = 4 * n * count + rows * (5 * count - 3)
        products = 4 * n * size + rows * (2 * size + 4 * others)
    else:  # forward; the inputs of all stages but the first; backward with the Gram matrix
        scale = 5 * rows * n
        passes = rows * (5 * count + 2 * (count - 1))
        products = rows * (6 * size + 2 * others)
    return d * (12 * size + passes * width) + scale * width, d * (6 * b * size + products)


def show(
    rows: int, d: int, n: int, m: int, b: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Print a line for each plan of BOFT(m, b) on a layer of d inputs and n outputs."""
    default = default_plan(m, b, device.type, rows, n)
    best = None
    if device.type == "cpu" or torch.cuda.is_available():
        best = tuned.lookup(PLAN, device, dtype, (m, b), (rows, d, n))
    lines = [HEADER]
    for weight_side, count in product((False, True), range(1, m + 1)):
        stages, this = plan(m, b, device.type, count), plan_choice(count, weight_side)
        marks = ["default"] * (this == default) + ["measured best"] * (this == best)
        marks += ["chosen"] * (this == (best or default))
        n_bytes, flops = work(rows, d, n, stages, b, dtype.itemsize, weight_side)
        sizes = " ".join(str(stage.size) for stage in stages)
        side = "weight" if weight_side else "in"
        figures = f"{n_bytes / 1e6:.1f}", f"{flops / 1e9:.2f}"
        lines.append((str(count), sizes, side, *figures, ", ".join(marks)))
    name = dtypes.name_of(dtype)
    print(f"BOFT({m}, {b}), {d} -> {n}, {rows} rows, {name} on {device.type}; a training step")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (
            cell.rjust(width) if title in ("stages", "MB", "GFLOP") else cell.ljust(width)
            for title, cell, width in zip(HEADER, line, widths, strict=True)
        )
        print("  ".join(cells).rstrip())
