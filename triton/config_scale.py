"""Tiles of the scale and of its gradient. Memory bounds both, so one tile each serves everything.

Imports neither torch nor triton.
"""

from typing import NamedTuple

# Programs that the gradient wants at least: eight for each multiprocessor of an H100.
PROGRAMS = 8 * 132


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


TILES = {
    "scale": ScaleConfig(ROWS=8, COLUMNS=512, num_warps=4, num_stages=1),
    "scale_backward": ScaleConfig(ROWS=4, COLUMNS=512, num_warps=4, num_stages=1),
}


def config_for(op: str) -> ScaleConfig:
    """Default tile of "scale" or "scale_backward"."""
    return TILES[op]


def default_tile(op: str, structure: dict[str, int], dtype: str) -> ScaleConfig:
    """Default config of an op, whatever the structure and dtype; for the tuner."""
    return config_for(op)


def is_legal(op: str, tile: ScaleConfig, structure: dict[str, int], dtype: str) -> bool:
    """True if a warp's loads stay whole and its numbers are likely to stay in registers."""
    numbers = tile.ROWS * tile.COLUMNS
    return 32 * tile.num_warps <= numbers <= 128 * 32 * tile.num_warps and tile.num_warps <= 16
