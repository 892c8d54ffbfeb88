"""Two stages in one pass over the rows: ``rotate`` twice, without what lies in between in memory.

For plans of two small stages on a GPU. How much it saves is a model, not a measurement: a pass
reads and writes x, and the second one is spared; what the kernel reads beside are the matrices,
once for some hundred rows (docs/cuda.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from ._runtime.backend import Op

WARPS, ROWS, PAD = 4, 16, 8  # of csrc/cuda/rotate_pair.cuh
MAX_SHARED = 227 << 10


@lru_cache
def _shared_memory(index: int) -> int:
    """What a block of threads can have of it on this GPU."""
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) == (8, 0):
        return 163 << 10
    return MAX_SHARED if major in (9, 10) else 99 << 10


def fits(
    sizes: tuple[int, int], chunk: int, strides: tuple[int, int], room: int = MAX_SHARED
) -> bool:
    """Whether both matrices of a span and 64 rows of it, in halves, are at most ``room`` bytes."""
    reaches = sizes[0] * strides[0], sizes[1] * strides[1]
    span = max(reaches)  # the neighbouring features that both stages mix
    halves = span * (sum(sizes) + 2 * PAD) + WARPS * ROWS * (span + PAD)
    return (
        all(size in (16, 32, 64) for size in sizes)
        and chunk % 2 == 0
        and span <= 1024
        and all(span % reach == 0 for reach in reaches)
        and 2 * halves <= room
    )


def _cuda_takes(
    x: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    chunk: int,
    first_stride: int,
    second_stride: int,
    _: bool,
) -> bool:
    room = _shared_memory(x.device.index) if x.device.type == "cuda" else MAX_SHARED
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and first.dtype == second.dtype == torch.float32
        and fits((first.shape[-1], second.shape[-1]), chunk, (first_stride, second_stride), room)
    )


def _fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def op_of(rotate: Callable) -> Op:
    """The op, from the reference of a single stage."""

    def reference(
        x: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        chunk: int,
        first_stride: int,
        second_stride: int,
        transpose: bool,
    ) -> torch.Tensor:
        stages = [(first, chunk, first_stride), (second, chunk, second_stride)]
        for stage in stages if transpose else stages[::-1]:
            x = rotate(x, *stage, transpose)
        return x

    return Op(
        # first: the stage of the smaller stride, which x R meets last
        "rotate_pair(Tensor x, Tensor first, Tensor second, int chunk, int first_stride,"
        " int second_stride, bool transpose) -> Tensor",
        reference,
        _fake,
        supports={"cuda": _cuda_takes},
        on_request=True,
    )
