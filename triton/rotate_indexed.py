"""Triton kernel that multiplies each row by the stage of its own adapter."""

from functools import lru_cache, partial

import torch
import triton
import triton.language as tl

from .config_rotate import Entry, Tile, TileTable
from .groups import load_stage, offsets, positions, product, program, round_to, rows_axis
from .launch import LAUNCHES, Launch, MeasuredTile, cdiv, expect
from .limits import limits_of, turns_for
from .rotate import count_tiles, launch_with, tile_for

# Half precision, too, sums over a group in parts here, unlike rotate: this kernel keeps more
# addresses in registers.
TILES = TileTable(
    half=(
        Entry(16, Tile(4, 64, 16, 16, num_warps=4, num_stages=2)),
        Entry(32, Tile(1, 128, 32, 32, num_warps=4, num_stages=2)),
        Entry(256, Tile(1, 64, 64, 32, num_warps=8, num_stages=1), rdna=True),
        Entry(256, Tile(1, 64, 64, 32, num_warps=4, num_stages=2)),
    ),
    float32=(
        Entry(16, Tile(4, 64, 16, 16, num_warps=4, num_stages=1)),
        Entry(32, Tile(1, 32, 32, 32, num_warps=4, num_stages=2)),
        Entry(256, Tile(1, 64, 64, 16, num_warps=4, num_stages=2)),
    ),
    float64=(
        Entry(16, Tile(4, 32, 16, 16, num_warps=4, num_stages=1)),
        Entry(256, Tile(1, 32, 32, 16, num_warps=4, num_stages=2)),
    ),
    strided=(
        Entry(16, Tile(4, 64, 16, 16, num_warps=4, num_stages=2)),
        Entry(32, Tile(4, 32, 32, 32, num_warps=4, num_stages=2)),
    ),
    whole=(),
    shares_rows=True,
)


@triton.jit(do_not_specialize=["n_rows", "n_adapters", "rows_per_program"])
def rotate_indexed_kernel(
    x_ptr, stage_ptr, index_ptr, y_ptr, n_rows, n_adapters, d, rows_per_program,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BANDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """y = x S, or x S^T, where S is the stage of the adapter that ``index`` names for the row.

    A tile of rows takes one product for each adapter in it; the rows of other adapters enter that
    product as zeros. In half precision y = x + x (S - I), as in ``rotate_kernel``.

    Args:
        x_ptr: (n_rows, d); any float dtype.
        stage_ptr: (n_adapters, d/SIZE, SIZE, SIZE) matrices of the groups; float32 or float64.
        index_ptr: (n_rows,) int32. -1 copies the row; other values out of range make it NaN.
        y_ptr: (n_rows, d) result; dtype of x.
        n_rows: rows of x.
        n_adapters: number of adapters.
        d: features of x.
        rows_per_program: a multiple of ROWS.
        SIZE: features of a group.
        CHUNK: neighboring features of a group.
        STRIDE: groups whose chunks alternate; 1 if a group is contiguous.
        TRANSPOSE: True for x S^T.
        INTERPRETED: True in Triton's interpreter.
        BANDS: bands per program (config_rotate.Tile).
        ROWS: rows per step.
        COLUMNS: entries of a group in the result.
        INNER: entries of a group summed over per step.
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
        # The adapters of this tile, in ascending order. An index out of range has no stage.
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
    *,
    tile: MeasuredTile = (),
) -> torch.Tensor:
    """Launch ``rotate_indexed_kernel``. The caller checks dtypes and devices.

    Args:
        x: (N, d).
        stages: (A, d/size, size, size), the stage of each adapter.
        index: (N,) int32, the adapter of each row; -1 for none.
        chunk: neighboring features of a group.
        stride: groups whose chunks alternate.
        transpose: True to multiply by the transposed matrices.
        tile: measured fields of ``Tile``.

    Returns:
        Rotated rows, like x.

    Raises:
        ValueError: a shape is not the one above.
    """
    size = stages.shape[-1]
    expect("stages", stages, len(stages), x.shape[1] // size, size, size)
    expect("index", index, len(x))
    x, stages, index = x.contiguous(), stages.contiguous(), index.contiguous()
    y = torch.empty_like(x)
    structure = size, chunk, stride, transpose
    launch = _indexed_launch(x.get_device(), x.dtype, *x.shape, len(stages), *structure, tile)
    launch(x, stages, index, y)
    return y


@lru_cache(LAUNCHES)
def _indexed_launch(
    device: int, dtype: torch.dtype, n: int, d: int, n_adapters: int,
    size: int, chunk: int, stride: int, transpose: bool, measured: MeasuredTile, shrink: int = 0,
) -> Launch | None:  # fmt: skip
    """Launch in the default or measured tile, or in one that is ``shrink`` times smaller."""
    limits, layout = limits_of(device), (size, chunk, stride)
    tile = tile_for(TILES, limits, dtype, *layout, measured, shrink)
    if tile is None:
        return None
    n_tiles = count_tiles(tile, d, size, tile.columns)
    slots = limits.multiprocessors * tile.programs
    rows = tile.rows * turns_for(n_tiles, cdiv(n, tile.rows), slots, start=1)
    smaller = partial(
        _indexed_launch, device, dtype, n, d, n_adapters, *layout, transpose, measured, shrink + 1
    )
    structure = {"SIZE": size, "CHUNK": chunk, "STRIDE": stride, "TRANSPOSE": transpose}
    grid, scalars = n_tiles * cdiv(n, rows), (n, n_adapters, d, rows)
    return launch_with(device, tile, rotate_indexed_kernel, grid, scalars, structure, smaller)
