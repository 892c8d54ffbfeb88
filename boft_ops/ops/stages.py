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

from .._runtime import gpu, internals

# Cost of reading and writing x once, in multiply-adds per feature. On two CPU cores 8 bytes at
# 10 GB/s against 2 flops at 100 GFLOP/s: some 40 to 80. On an H100, by its data sheet, 4 bytes at
# 3.35 TB/s against 2 flops at some 600 TFLOP/s: about 350.
PASS_COST = {"cpu": 64, "cuda": 350}

PARTIAL_BYTES = 16 << 20  # most memory for the partial sums of one stage
ROWS = 4096  # rows for which the number of partial sums is chosen


class Pass(NamedTuple):
    """A pass over x and its gradient by which a kernel sums the gradient of a stage.

    Attributes:
        size: largest groups.
        features: features of a program.
        registers: registers of a thread. A program has eight warps.
        shared: KiB of shared memory of a program.
        capability: least compute capability.
    """

    size: int
    features: int
    registers: int
    shared: int
    capability: int = 0


# Triton's tiles in half precision (triton/rotate_backward.py), for groups of neighboring features.
# The first one that is for the groups and the device counts.
PASSES = (
    Pass(64, 64, 80, 58, 90),
    Pass(64, 64, 202, 32),
    Pass(128, 128, 191, 137, 90),
    Pass(128, 64, 219, 48),
    Pass(256, 64, 102, 65),
)
# Programs that a multiprocessor gets, although more may fit: on an H200 a pass over 8192 rows of
# 4096 was fastest in 4 splits, which are two programs for each (docs/kernels.md has the results).
MOST_PROGRAMS = 2


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
        groups, and is best filled by whole waves of them. The number depends on the structure and
        the device alone: a constant of a compiled graph.
        """
        if x.device.type == "cpu":
            return 1
        function = _splits if torch.compiler.is_compiling() else _cached_splits
        return function(x.shape[-1], self.size, x.device.index or 0)


@internals.constant_in_graphs
def _splits(features: int, size: int, device: int) -> int:
    limits = gpu.limits_of(device)
    able = (p for p in PASSES if size <= p.size and p.capability <= limits.capability)
    found = next(able, PASSES[-1])
    programs = limits.programs(8, found.registers, found.shared << 10)
    slots = limits.multiprocessors * min(MOST_PROGRAMS, programs)
    # A partial sum of float32 is written and read, rows of half precision are read twice and
    # written once: 8 size against 6 ROWS bytes a feature.
    return gpu.triton_object("limits:splits_for")(
        -(-features // found.features),
        slots,
        most=PARTIAL_BYTES // (4 * features * size),
        partial=8 * size / (6 * ROWS),
    )


_cached_splits = lru_cache(maxsize=256)(_splits)


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
