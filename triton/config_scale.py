"""The tile of the scale's gradient: bound by memory, so one of whole lines serves everything."""

from collections.abc import Iterator
from dataclasses import dataclass

from .config import Case

PROGRAMS = 4 * 132  # wanted at least: four for each multiprocessor of an H100


@dataclass(frozen=True)
class ScaleConfig:
    """ROWS x COLUMNS numbers at a time."""

    ROWS: int
    COLUMNS: int
    num_warps: int
    num_stages: int


def config_for() -> ScaleConfig:
    return ScaleConfig(ROWS=16, COLUMNS=128, num_warps=4, num_stages=3)


def compile_cases() -> Iterator[Case]:
    config = config_for()
    constants = {"INTERPRETED": False, "ROWS": config.ROWS, "COLUMNS": config.COLUMNS}
    for rows, wide in (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
        pointers = dict.fromkeys(("grad_ptr", "x_ptr", "x_grad_ptr"), rows)
        pointers |= dict.fromkeys(("scale_ptr", "center_ptr", "sums_ptr"), wide)
        everywhere = rows in ("bf16", "fp32")
        launch = config.num_warps, config.num_stages
        yield Case("scale:scale_backward_kernel", constants, pointers, *launch, everywhere)
