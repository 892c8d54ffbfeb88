"""Rows times the stage of the adapter that each of them names, in Triton."""

import torch
import triton
import triton.language as tl

from .groups import load_stage, offsets, positions, product, program, round_to, rows_axis
from .launch import Launch, cdiv, remembered
from .rotate import PROGRAMS, _launch_of, _n_tiles, _tile


@triton.jit(do_not_specialize=["n_rows", "n_adapters", "rows_per_program"])
def rotate_indexed_kernel(
    x_ptr, stage_ptr, index_ptr, y_ptr, n_rows, n_adapters, d, rows_per_program,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BANDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """y = x S, S that of each row's adapter; a tile takes one product for each adapter in it.

    The rows of the other adapters enter such a product as zeros. Of halves, y = x + x (S - I).
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    RESIDUAL: tl.constexpr = dtype.primitive_bitwidth < 32
    sum_dtype: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    group, part, first = program(d, SIZE, (SIZE + COLUMNS - 1) // COLUMNS, COLUMNS, BANDS)
    first *= rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    column, column_inside = positions(group, part * COLUMNS, d, SIZE, COLUMNS, BANDS)
    row = tl.arange(0, ROWS)
    out = offsets(row, column, d, SIZE, CHUNK, STRIDE, BANDS)
    for start in range(first, last, ROWS):
        base = start * d
        inside = row < last - start
        index = tl.load(index_ptr + start + row, mask=inside, other=-1)
        out_mask = rows_axis(inside, BANDS) & column_inside[None]
        y = tl.load(x_ptr + base + out, mask=out_mask, other=0.0).to(sum_dtype)
        if not RESIDUAL:
            y = tl.where(rows_axis(index == -1, BANDS), y, 0.0)
        valid = (index >= -1) & (index < n_adapters)
        y = tl.where(rows_axis(valid, BANDS), y, float("nan"))
        # the adapters of this tile in ascending order; what is out of range has no stage
        adapter = tl.min(tl.where(index >= 0, index, n_adapters))
        while adapter < n_adapters:
            mine = rows_axis(index == adapter, BANDS)
            stages = stage_ptr + adapter.to(tl.int64) * d * SIZE
            for k in range(0, SIZE, INNER):
                inner, inner_inside = positions(group, k, d, SIZE, INNER, BANDS)
                into = offsets(row, inner, d, SIZE, CHUNK, STRIDE, BANDS)
                x = tl.load(x_ptr + base + into, mask=mine & inner_inside[None], other=0.0)
                stage = load_stage(
                    stages, inner, inner_inside, column, column_inside, dtype,
                    SIZE, TRANSPOSE, INTERPRETED, BANDS,
                )  # fmt: skip
                y = product(x, stage, y, BANDS, INTERPRETED)
            adapter = tl.min(tl.where(index > adapter, index, n_adapters))
        tl.store(y_ptr + base + out, round_to(y, dtype, INTERPRETED), mask=out_mask)


def rotate_indexed(
    x: torch.Tensor,
    stages: torch.Tensor,
    index: torch.Tensor,
    chunk: int,
    stride: int,
    transpose: bool,
) -> torch.Tensor:
    """x (N, d), stages (A, d/size, size, size), index (N,) int32; checked by the caller."""
    x, stages, index = x.contiguous(), stages.contiguous(), index.contiguous()
    y = torch.empty_like(x)
    structure = stages.shape[-1], chunk, stride, transpose
    launch = _indexed_launch(x.get_device(), x.dtype, *x.shape, len(stages), *structure)
    launch(x, stages, index, y)
    return y


@remembered
def _indexed_launch(
    device: int, dtype: torch.dtype, n: int, d: int, n_adapters: int,
    size: int, chunk: int, stride: int, transpose: bool,
) -> Launch:  # fmt: skip
    tile = _tile("rotate_indexed", device, dtype, n, d, size, chunk, stride)
    n_tiles = _n_tiles(tile, d, size, tile.columns)
    row_tiles = cdiv(n, tile.rows)
    rows = tile.rows * max(1, min(8, n_tiles * row_tiles // PROGRAMS))
    structure = {"SIZE": size, "CHUNK": chunk, "STRIDE": stride, "TRANSPOSE": transpose}
    scalars = n, n_adapters, d, rows
    return _launch_of(rotate_indexed_kernel, n_tiles * cdiv(n, rows), scalars, structure, tile)
