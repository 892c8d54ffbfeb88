"""The tiles of the scale and of its gradient: bound by memory, so one each serves everything."""

from collections.abc import Iterator
from typing import NamedTuple

from .config import Case

PROGRAMS = 8 * 132  # of the gradient, wanted at least: eight for each multiprocessor of an H100


class ScaleConfig(NamedTuple):
    """ROWS x COLUMNS numbers at a time."""

    ROWS: int
    COLUMNS: int
    num_warps: int
    num_stages: int


TILES = {
    "scale": ScaleConfig(ROWS=8, COLUMNS=512, num_warps=4, num_stages=1),
    "scale_backward": ScaleConfig(ROWS=4, COLUMNS=512, num_warps=4, num_stages=1),
}


def config_for(op: str) -> ScaleConfig:
    """The tile of "scale" or "scale_backward"."""
    return TILES[op]


def compile_cases() -> Iterator[Case]:
    for rows, wide in (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
        vectors = {
            "scale": dict.fromkeys(("x_ptr", "y_ptr", "center_ptr", "bias_ptr"), rows)
            | {"scale_ptr": wide},
            "scale_backward": dict.fromkeys(("grad_ptr", "x_ptr", "center_ptr", "x_grad_ptr"), rows)
            | dict.fromkeys(("scale_ptr", "sums_ptr"), wide),
        }
        for op, pointers in vectors.items():
            config = TILES[op]
            constants = {"INTERPRETED": False, "ROWS": config.ROWS, "COLUMNS": config.COLUMNS}
            launch = config.num_warps, config.num_stages
            yield Case(f"scale:{op}_kernel", constants, pointers, *launch, rows in ("bf16", "fp32"))
