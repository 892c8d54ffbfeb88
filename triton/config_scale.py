"""Tiles of the scale and of its gradient. Memory bounds both, so one tile each serves everything.

Does not import triton.
"""

from typing import NamedTuple

from .limits import Limits

# Programs for each multiprocessor that the gradient wants at least.
PROGRAMS = 8


class ScaleConfig(NamedTuple):
    """Part of the rows that a program holds at a time.

    Attributes:
        ROWS: rows of x.
        COLUMNS: features of x.
        num_warps: warps per program.
        num_stages: stages of software pipelining.
    """

    ROWS: int
    COLUMNS: int
    num_warps: int
    num_stages: int


class ScaleTiles(NamedTuple):
    """Configs of one kernel: its default, and the others that a measurement may choose."""

    config: ScaleConfig

    @property
    def type(self) -> type[ScaleConfig]:
        """The NamedTuple whose fields a measurement may set."""
        return ScaleConfig

    def default(self, structure: dict[str, int], dtype: str, limits: Limits) -> ScaleConfig:
        """Default config, whatever the structure, dtype and device."""
        return self.config

    def is_legal(self, config: ScaleConfig, structure: dict[str, int], dtype: str) -> bool:
        """True if a warp's loads stay whole and its numbers are likely to stay in registers."""
        numbers = config.ROWS * config.COLUMNS
        return 32 * config.num_warps <= numbers <= 4096 * config.num_warps <= 1 << 16


# The fastest on an H200 (bench/results/nvidia-h200/decide.jsonl).
FORWARD = ScaleTiles(ScaleConfig(ROWS=8, COLUMNS=256, num_warps=4, num_stages=1))
BACKWARD = ScaleTiles(ScaleConfig(ROWS=2, COLUMNS=512, num_warps=2, num_stages=1))
