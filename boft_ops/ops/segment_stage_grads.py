"""Gradients of the stages of sorted rows: a segment of neighboring rows for each stage.

``segment_stage_grads`` is ``rotate_stage_grad`` for many stages in one pass over the rows. The
experts of a layer have their rows so, and so do rows that are sorted by adapter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._runtime.backend import Kernel, Op
from .._runtime.dtypes import COMPUTE
from .._runtime.limits import MAX_STAGE
from .._runtime.workload import Workload
from .rotate import ROWS, class_of_rows, rotate_stage_grad_reference
from .stages import Stage, plan

SAMPLE_SEGMENTS = 8


def segment_stage_grads_reference(
    x: torch.Tensor,
    grad: torch.Tensor,
    offsets: torch.Tensor,
    size: int,
    chunk: int,
    stride: int,
    splits: int,
) -> torch.Tensor:
    # A mask for each segment, because vmap and compiled graphs know no numbers to slice by.
    row, first, grams = torch.arange(len(x), device=x.device), 0, []
    for last in offsets:
        own = torch.where(((row >= first) & (row < last))[:, None], x, 0)
        grams.append(rotate_stage_grad_reference(own, grad, size, chunk, stride, splits))
        first = last
    if not grams:
        return x.new_zeros(splits, 0, x.shape[1] // size, size, size, dtype=COMPUTE[x.dtype])
    return torch.stack(grams, 1)


def _fake(x, grad, offsets, size, chunk, stride, splits) -> torch.Tensor:
    shape = splits, offsets.shape[0], x.shape[1] // size, size, size
    return x.new_empty(shape, dtype=COMPUTE[x.dtype])


def _samples(w: Workload) -> Iterator[tuple]:
    """Rows in SAMPLE_SEGMENTS segments of one size."""
    ends = torch.arange(1, SAMPLE_SEGMENTS + 1, device=w.device) * w.rows // SAMPLE_SEGMENTS
    for stage in plan(w.n_factors, w.block_size, w.device.type):
        x, splits = w.x(), splits_of(stage, w.x(), SAMPLE_SEGMENTS)
        yield x, w.grad_x(), ends.int(), stage.size, stage.chunk, stage.stride, splits


def _class_of(x, grad, offsets, size, chunk, stride, splits) -> tuple[tuple, tuple]:
    return class_of_rows(size, chunk, stride, x)


def _cpu_supports(x, grad, offsets, size, chunk, stride, splits) -> bool:
    # A size has no limit here: a BLAS, faster at large ones, would take a call for each segment.
    return x.dtype != torch.float16 and splits == 1


def _gpu_supports(x, grad, offsets, size, *_: int) -> bool:
    return size <= MAX_STAGE


segment_stage_grads = Op(
    # x, grad (N, d); offsets (E,) int32: segment e is rows [offsets[e-1], offsets[e]), and the
    # first begins at row 0 -> (splits, E, d/size, size, size), partial sums in at least float32
    "segment_stage_grads(Tensor x, Tensor grad, Tensor offsets, int size, int chunk, int stride,"
    " int splits) -> Tensor",
    reference=segment_stage_grads_reference,
    fake=_fake,
    samples=_samples,
    kernels={
        "cpu": Kernel(_cpu_supports),
        "cuda": Kernel(_gpu_supports),
        "triton": Kernel(
            _gpu_supports,
            "segment_stage_grads:segment_stage_grads",
            "rotate_backward:STAGE_GRAD_TILES",
        ),
    },
    shape_class=ROWS._replace(of=_class_of),
    comparable=lambda partials: partials.sum(0),
    flops=lambda x, grad, offsets, size, *_: 2 * x.numel() * size,
)


def splits_of(stage: Stage, x: torch.Tensor, n_segments: int) -> int:
    """The number of partial sums over the rows of each segment, a constant of a compiled graph.

    Segments are programs of their own, so that fewer parts of each keep a GPU busy.
    """
    return -(-stage.splits(x) // max(1, n_segments))


def total(partials: torch.Tensor) -> torch.Tensor:
    """The sum of partial sums (splits, ...), which is no copy if there is one."""
    return partials[0] if len(partials) == 1 else partials.sum(0)
