"""Groups the m factors of a butterfly into dense stages.

Consecutive factors [first, last) collapse exactly into one block-diagonal matrix whose dense blocks
of ``size`` features lie over chunks ``stride`` apart. A few large stages read x seldom and multiply
much; many small stages do the reverse. The plan takes the cheapest number of equal stages.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

# Cost of reading and writing x once, in multiply-adds per feature. On two CPU cores 8 bytes at
# 10 GB/s against 2 flops at 100 GFLOP/s: some 40 to 80. On an H100, by its data sheet, 4 bytes at
# 3.35 TB/s against 2 flops at some 600 TFLOP/s: about 350.
PASS_COST = {"cpu": 64, "cuda": 350}

# Programs that keep a GPU busy in one pass over x: four for each multiprocessor of an H100.
GPU_PROGRAMS = 4 * 132
PARTIAL_BYTES = 16 << 20  # most memory for the partial sums of one stage


class Stage(NamedTuple):
    """Factors [first, last) as one dense block-diagonal matrix.

    Attributes:
        first, last: the range of factors.
        size: rows and columns of each dense block.
        chunk: width in features of the chunks that the factors permute (b/2; b if m == 1).
        stride: distance between the chunks of one block, in chunks (2**first).
    """

    first: int
    last: int
    size: int
    chunk: int
    stride: int

    def splits(self, x: torch.Tensor) -> int:
        """The number of partial sums over the rows of x (N, d) that the gradient of the stage has.

        One on a CPU, whose threads divide the groups. A GPU needs more programs than there are
        groups. The number depends on the structure alone: a constant of a compiled graph.
        """
        if x.device.type == "cpu":
            return 1
        groups = x.shape[-1] // self.size
        # small groups share a program by the dozen, large ones are tiles of 64
        programs = -(-groups * self.size // 64) if self.size <= 16 else groups * -(-self.size // 64)
        most = PARTIAL_BYTES // (4 * groups * self.size**2)
        return max(1, min(-(-GPU_PROGRAMS // programs), most))


def plan(
    n_factors: int, block_size: int, device: str = "cpu", n_stages: int | None = None
) -> tuple[Stage, ...]:
    """The stages of a butterfly, smallest stride first.

    Args:
        n_factors: m >= 1.
        block_size: b; even if m > 1.
        device: the type of the device that x is on.
        n_stages: number of stages; None: the cheapest number.

    Returns:
        Stages that cover the factors 0..m-1 in order. x meets the last one first.
    """
    # Dynamo traces through a cache with a warning, which is spared here
    function = _plan.__wrapped__ if torch.compiler.is_compiling() else _plan
    return function(
        n_factors, block_size, PASS_COST["cpu" if device == "cpu" else "cuda"], n_stages
    )


@lru_cache(maxsize=256)
def _plan(
    n_factors: int, block_size: int, pass_cost: int, n_stages: int | None = None
) -> tuple[Stage, ...]:
    if n_factors == 1:  # plain block-diagonal; b may be odd
        return (Stage(0, 1, block_size, block_size, 1),)
    if n_stages is not None:
        return _split(n_factors, block_size, n_stages)

    choices = [_split(n_factors, block_size, n) for n in range(1, n_factors + 1)]
    costs = [sum(stage.size + pass_cost for stage in stages) for stages in choices]
    return choices[costs.index(min(costs))]


def _split(n_factors: int, block_size: int, n_stages: int) -> tuple[Stage, ...]:
    chunk = block_size // 2
    cuts = [i * n_factors // n_stages for i in range(n_stages + 1)]
    return tuple(
        Stage(first, last, chunk << (last - first), chunk, 1 << first)
        for first, last in pairwise(cuts)
    )
