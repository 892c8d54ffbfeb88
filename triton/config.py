"""Configs of the Triton kernels that make the stages: a frozen tuple per kernel, chosen purely.

``config_for`` depends on the structure of the operands alone, not on the device or the dtype. A
measured tile replaces fields of its result when a kernel is launched. Block sizes are padded to
powers of two, because Triton's tiles have no other sizes. Does not import triton.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from .limits import Limits

MAX_BLOCK_SIZE = 64


class CayleyConfig(NamedTuple):
    """Tile of the Cayley transform and of its gradient.

    Attributes:
        B: block size, padded to a power of two.
        G: blocks per program.
    """

    B: int
    G: int
    num_warps: int


def _cayley(b: int) -> CayleyConfig:
    # Up to B = 8 one warp suffices, and reductions are shuffles within it. Above, the tile is
    # spread over more warps, so that float64 stays in registers.
    B = _padded(b)
    # B = 8 takes 16 blocks per program, which are faster than few on an H200. The ratios of these
    # configs are in bench/results/nvidia-h200/decide.jsonl.
    G = 16 if B == 8 else max(1, 16 // B)
    return CayleyConfig(B, G, num_warps={16: 2, 32: 4, 64: 8}.get(B, 1))


def _cayley_backward(b: int) -> CayleyConfig:
    # B = 8 takes 8 blocks per program. On an H200 16 are faster still, but they spill on other
    # GPUs.
    forward = _cayley(b)
    return forward._replace(G=8) if forward.B == 8 else forward


class ComposeConfig(NamedTuple):
    """Tile of compose and of its gradient, which share it.

    A unit is the half of a block that meets one inner group (compose.py).

    Attributes:
        B: rows of a block, padded to a power of two.
        T: features of an inner group, padded likewise.
        U: units per program.
    """

    B: int
    T: int
    U: int
    num_warps: int


def _compose(b: int, s: int) -> ComposeConfig:
    # Four numbers per thread; more only if one unit alone has more.
    B = _padded(b)
    T = B * (s // b)
    num_warps = min(8, max(1, B * T // 128))
    return ComposeConfig(B, T, U=max(1, 128 * num_warps // (B * T)), num_warps=num_warps)


class StageFromSkewConfig(NamedTuple):
    """Tile of the stage_from_skew kernels, which transform blocks and compose them in one program.

    Attributes:
        B: block size, padded to a power of two.
        G: groups per program.
        C: blocks that the Cayley transform takes at a time.
    """

    B: int
    G: int
    C: int
    num_warps: int


def _stage_from_skew(m: int, b: int, many: bool = False) -> StageFromSkewConfig:
    # Groups of up to 16 x 16 take one warp; 64 x 64 over 8 warps are 16 numbers per thread. With
    # more than one warp, the Cayley transform (float64) takes as many blocks at a time as there are
    # threads.
    B = _padded(b)
    size = B << (m - 1)
    G = max(1, 256 // size**2)
    C = min(G << (m - 1), max(1, (128 if size == 32 else 256) // B**2))
    if many and (B, size) == (8, 16):
        # On an H200, of 131072 features, 1.35 times as fast as G = 1, C = 2.
        G, C = 4, 8
    return StageFromSkewConfig(B, G, C, num_warps={32: 4, 64: 8}.get(size, 1))


def _stage_from_skew_backward(m: int, b: int, many: bool = False) -> StageFromSkewConfig:
    # More warps where a few numbers would spill: with many small blocks, or large ones in float64.
    forward = _stage_from_skew(m, b, many)
    if forward != _stage_from_skew(m, b):
        # C = 8 was 1.49 times as fast on an H200, but spills on sm_80. C = 4 has not been timed.
        forward = forward._replace(C=4)
    if forward.num_warps == 8 and forward.B <= 8:
        return forward._replace(num_warps=16)
    return forward._replace(num_warps=8) if forward.B == 32 else forward


def _padded(b: int) -> int:
    return max(2, 1 << (b - 1).bit_length())


Config = CayleyConfig | ComposeConfig | StageFromSkewConfig

_DEFAULTS = {
    "cayley": _cayley,
    "cayley_backward": _cayley_backward,
    "compose": _compose,
    "stage_from_skew": _stage_from_skew,
    "stage_from_skew_backward": _stage_from_skew_backward,
}


@cache
def config_for(op: str, **structure: int) -> Config:
    """Default config of an op for one structure.

    Args:
        op: "cayley", "cayley_backward", "compose" (whose backward shares it), "stage_from_skew" or
            "stage_from_skew_backward".
        structure: block size b for cayley; b and s, the features of an inner group, for compose;
            number of factors m and b for stage_from_skew, and many, True if the groups fill the
            device with more than a few of them in each program.
    """
    return _DEFAULTS[op](**structure)


class BlockTiles(NamedTuple):
    """Configs of one kernel that a measurement may choose among.

    Attributes:
        op: as for ``config_for``.
        type: the NamedTuple whose fields a measurement may set.
        most: numbers of a tile that a thread may hold, likely without spilling.
    """

    op: str
    type: type
    most: int

    def default(self, structure: dict[str, int], dtype: str, limits: Limits) -> Config:
        """Default config by the numbers of an op's shape class, whatever the dtype and device."""
        return self._config_for(structure)

    def _config_for(self, structure: dict[str, int]) -> Config:
        if "n_factors" in structure:
            return config_for(self.op, m=structure["n_factors"], b=structure["block_size"])
        return config_for(self.op, b=structure["block_size"])

    def is_legal(self, config: Config, structure: dict[str, int], dtype: str) -> bool:
        """True if a config fits the structure, and is likely to stay in registers."""
        if config.B != self._config_for(structure).B or config.num_warps > 16:
            return False
        blocks = config.G
        if isinstance(config, StageFromSkewConfig):
            blocks = config.C
            if blocks > config.G << (structure["n_factors"] - 1):
                return False
        return blocks * config.B**2 <= self.most * 32 * config.num_warps


# Two tiles of a transform are in registers, of float64 in the stage_from_skew kernels. On an H200
# cayley was fastest with 32 numbers a thread; more are tried.
CAYLEY = BlockTiles("cayley", CayleyConfig, 128)
CAYLEY_BACKWARD = BlockTiles("cayley_backward", CayleyConfig, 128)
STAGE_FROM_SKEW = BlockTiles("stage_from_skew", StageFromSkewConfig, 32)
STAGE_FROM_SKEW_BACKWARD = BlockTiles("stage_from_skew_backward", StageFromSkewConfig, 32)
