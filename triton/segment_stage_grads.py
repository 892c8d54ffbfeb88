"""Triton kernel of the gradients of the stages of sorted rows: a segment of rows for each."""

from functools import lru_cache, partial

import torch
import triton
import triton.language as tl

from .groups import (
    columns_axis,
    entry,
    gram_of,
    inner_axis,
    offsets,
    positions,
    program,
    rows_axis,
    same_group,
)
from .launch import COMPUTE, LAUNCHES, Launch, MeasuredTile
from .limits import limits_of
from .rotate import count_tiles, launch_with, tile_for
from .rotate_backward import STAGE_GRAD_TILES


@triton.jit
def end_of(segment, ends_ptr, n_rows):
    """End of a segment, 0 for the one before the first; not beyond the rows."""
    end = tl.load(ends_ptr + segment, mask=segment >= 0, other=0)
    return tl.minimum(tl.maximum(end, 0), n_rows)


@triton.jit(do_not_specialize=["n_rows", "n_segments", "splits"])
def segment_stage_grads_kernel(
    x_ptr, grad_ptr, ends_ptr, partials_ptr, n_rows, d, n_segments, splits,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, STRIDE: tl.constexpr, INTERPRETED: tl.constexpr,
    BANDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """x^T grad of each group, over one split of the rows of one segment.

    Every segment has programs of its own, also an empty one, which stores zeros: no row is read
    twice, and the grid does not depend on the ends of the segments.

    Args:
        x_ptr: (n_rows, d); any float dtype.
        grad_ptr: (n_rows, d); dtype of x.
        ends_ptr: (n_segments,) int32; the first segment begins at row 0, and each where the one
            before it ends.
        partials_ptr: (splits, n_segments, d/SIZE, SIZE, SIZE) result; float32, or float64 if x is.
        n_rows: rows of x.
        d: features of x.
        n_segments: number of segments.
        splits: parts of the rows of a segment.
        SIZE: features of a group.
        CHUNK: neighboring features of a group.
        STRIDE: groups whose chunks alternate; 1 if a group is contiguous.
        INTERPRETED: True in Triton's interpreter.
        BANDS: bands per program (config_rotate.Tile).
        ROWS: rows per step.
        COLUMNS: entries of a group taken from x.
        INNER: entries of a group taken from grad.
    """
    across: tl.constexpr = (SIZE + INNER - 1) // INNER
    parts: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS * across
    group, part, turn = program(d, SIZE, parts, COLUMNS, BANDS)
    segment = turn % n_segments
    begin, end = end_of(segment - 1, ends_ptr, n_rows), end_of(segment, ends_ptr, n_rows)
    share = (tl.maximum(end - begin, 0) + splits - 1) // splits
    share = (share + ROWS - 1) // ROWS * ROWS
    first = begin + turn // n_segments * share
    last = tl.minimum(first + share, end)
    left_offset, right_offset = part // across * COLUMNS, part % across * INNER
    left, left_inside = positions(group, left_offset, d, SIZE, COLUMNS, BANDS)
    right, right_inside = positions(group, right_offset, d, SIZE, INNER, BANDS)
    row = tl.arange(0, ROWS)
    left_at = offsets(row, left, d, SIZE, CHUNK, STRIDE, BANDS)
    right_at = offsets(row, right, d, SIZE, CHUNK, STRIDE, BANDS)
    at = entry(inner_axis(left, BANDS), columns_axis(right, BANDS), SIZE, False)
    gram = tl.zeros(at.shape, partials_ptr.dtype.element_ty)
    for start in range(first, last, ROWS):
        base = start * d
        there = rows_axis(row < last - start, BANDS)
        x = tl.load(x_ptr + base + left_at, mask=there & left_inside[None], other=0.0)
        grad = tl.load(grad_ptr + base + right_at, mask=there & right_inside[None], other=0.0)
        gram = gram_of(x, grad, gram, BANDS, INTERPRETED)
    inside = inner_axis(left_inside, BANDS) & columns_axis(right_inside, BANDS)
    inside = same_group(inner_axis(left, BANDS), columns_axis(right, BANDS), inside, SIZE, COLUMNS)
    tl.store(partials_ptr + turn * d * SIZE + at, gram, mask=inside)


def segment_stage_grads(
    x: torch.Tensor,
    grad: torch.Tensor,
    ends: torch.Tensor,
    size: int,
    chunk: int,
    stride: int,
    splits: int,
    *,
    tile: MeasuredTile = (),
) -> torch.Tensor:
    """Launch ``segment_stage_grads_kernel``. The caller checks the arguments.

    Args:
        x: (N, d).
        grad: (N, d).
        ends: (E,) int32, the end of each segment.
        size: features of a group.
        chunk: neighboring features of a group.
        stride: groups whose chunks alternate.
        splits: parts of the rows of a segment, each with a partial sum.
        tile: measured fields of ``Tile``.

    Returns:
        Partial sums (splits, E, d/size, size, size), in float64 if x is, else float32.
    """
    x, grad, ends = x.contiguous(), grad.contiguous(), ends.contiguous()
    shape = splits, len(ends), x.shape[1] // size, size, size
    if x.numel() == 0:
        return x.new_zeros(shape, dtype=COMPUTE[x.dtype])
    partials = x.new_empty(shape, dtype=COMPUTE[x.dtype])
    shape = x.get_device(), x.dtype, *x.shape
    launch = _segments_launch(*shape, len(ends), splits, size, chunk, stride, tile)
    launch(x, grad, ends, partials)
    return partials


@lru_cache(LAUNCHES)
def _segments_launch(
    device: int, dtype: torch.dtype, n: int, d: int, n_segments: int, splits: int,
    size: int, chunk: int, stride: int, measured: MeasuredTile, shrink: int = 0,
) -> Launch | None:  # fmt: skip
    """Launch in the default or measured tile, or in one that is ``shrink`` times smaller."""
    layout = size, chunk, stride
    tile = tile_for(STAGE_GRAD_TILES, limits_of(device), dtype, *layout, measured, shrink)
    if tile is None:
        return None
    smaller = partial(
        _segments_launch, device, dtype, n, d, n_segments, splits, *layout, measured, shrink + 1
    )
    structure = {"SIZE": size, "CHUNK": chunk, "STRIDE": stride}
    grid = splits * n_segments * count_tiles(tile, d, size, tile.columns, tile.inner)
    scalars = n, d, n_segments, splits
    return launch_with(device, tile, segment_stage_grads_kernel, grid, scalars, structure, smaller)
