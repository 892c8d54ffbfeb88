"""Counts the waves of programs that each launch takes on several GPUs, without one.

``python tests/helpers/waves.py --write`` rewrites tests/data/waves.csv. The slots of a device come
from the resources that the compiler reports (tests/data/triton_resources.csv), not from what the
tables of tiles expect.
"""

import csv
import sys
from pathlib import Path
from unittest import mock

import torch
from triton_cases import TABLES, rotate_case
from triton_resources import TARGETS, label, read_table

from boft_ops.ops import stages
from boft_ops.triton_kernels import rotate, rotate_backward

TABLE = Path(__file__).resolve().parents[1] / "data" / "waves.csv"
COLUMNS = ("gpu", "rows", "features", "kernel", "size", "slots", "programs", "waves", "fill")
GPUS = {"H200": "sm_90", "A100": "sm_80", "L4": "sm_89", "T4": "sm_75"}
SHAPES = ((8192, 4096), (8192, 14336), (2048, 4096))  # rows, features
SIZES = {"rotate": (16, 32, 64, 128, 256), "rotate_backward": (16, 32, 64, 128)}


def launches():
    """Yield a row of the table for each launch."""
    _, resources = read_table()
    for gpu, target in GPUS.items():
        limits = TARGETS[target][1]
        dtype = "bfloat16" if limits.multiplies_halves else "float32"
        for rows, features in SHAPES:
            for op, sizes in SIZES.items():
                for size in sizes:
                    structure = {"size": size, "chunk": size, "stride": 1}
                    tile = TABLES[op].default(structure, dtype, limits)
                    if tile is None:
                        continue
                    name = label(rotate_case(op, tile, structure | {"dtype": dtype}))
                    if (target, name) not in resources:
                        continue  # the table has not every size in float32
                    used = resources[target, name]
                    fitting = limits.programs(tile.num_warps, used["registers"], used["shared"])
                    most = tile.programs or stages.MOST_PROGRAMS  # the kernel asks for no more
                    slots = min(fitting, most) * limits.multiprocessors
                    programs = count_programs(op, size, rows, features, dtype, limits)
                    waves = programs / slots
                    fill = waves / -(-programs // slots)
                    figures = f"{waves:.2f}", f"{fill:.2f}"
                    yield gpu, rows, features, op, size, slots, programs, *figures


def count_programs(op, size, rows, features, dtype, limits):
    """Programs of a launch on a device with these limits."""
    sizes = 0, getattr(torch, dtype), rows, features
    with (
        mock.patch.object(stages.gpu, "limits_of", return_value=limits),
        mock.patch.object(rotate, "limits_of", return_value=limits),
        mock.patch.object(rotate_backward, "limits_of", return_value=limits),
    ):
        if op == "rotate":
            launch = rotate._rotate_launch.__wrapped__(*sizes, size, size, 1, False, ())
        else:
            splits = stages._splits(features, size, 0)
            build = rotate_backward._backward_launch.__wrapped__
            launch = build(*sizes, splits, size, size, 1, False, ())
    return launch._grid


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    with TABLE.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *launches()])
