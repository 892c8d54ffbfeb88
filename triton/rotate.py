"""Triton kernel that multiplies rows by a stage, and what the rotate kernels share.

groups.py explains tiles, positions and groups; config_rotate.py the table of tiles.
"""

import math
import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl

from .config_rotate import Entry, Tile, TileTable, constants_of
from .groups import load_stage, offsets, positions, product, program, round_to, rows_axis
from .launch import LAUNCHES, Launch, MeasuredTile, cdiv, expect
from .limits import Limits, limits_of, turns_for

# True in Triton's interpreter, whose half-precision arithmetic needs help. Read on import, as
# @triton.jit reads it.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

TILES = TileTable(
    half=(
        # three programs of a multiprocessor, of the six that fit, took 0.92 of the time on an H200
        Entry(32, Tile(1, 64, 64, 64, num_warps=4, num_stages=3, programs=3), 32, 80),
        Entry(64, Tile(1, 64, 64, 64, num_warps=8, num_stages=3), 32, 80),
        Entry(128, Tile(1, 32, 128, 128, num_warps=8, num_stages=1), rdna=True),
        Entry(256, Tile(1, 32, 64, 256, num_warps=8, num_stages=1), rdna=True),
        Entry(128, Tile(1, 64, 128, 128, num_warps=8, num_stages=3), 80, 90),
        Entry(256, Tile(1, 64, 128, 256, num_warps=8, num_stages=1), 112, 137, capability=100),
        Entry(256, Tile(1, 64, 256, 256, num_warps=8, num_stages=3), 226, 255, capability=90),
        Entry(256, Tile(1, 64, 128, 256, num_warps=8, num_stages=1), 112, 137),
        Entry(256, Tile(1, 32, 128, 256, num_warps=8, num_stages=1), 88, 72),
    ),
    float32=(
        Entry(16, Tile(4, 64, 16, 16, num_warps=4, num_stages=1)),
        Entry(32, Tile(1, 64, 32, 32, num_warps=4, num_stages=2)),
        Entry(256, Tile(1, 64, 64, 16, num_warps=4, num_stages=2)),
    ),
    float64=(
        Entry(16, Tile(4, 32, 16, 16, num_warps=4, num_stages=1)),
        Entry(256, Tile(1, 32, 32, 16, num_warps=4, num_stages=2)),
    ),
    strided=(
        Entry(16, Tile(4, 64, 16, 16, num_warps=4, num_stages=2)),
        Entry(32, Tile(4, 32, 32, 32, num_warps=4, num_stages=2)),
        Entry(64, Tile(8, 16, 64, 64, num_warps=8, num_stages=1), 96, 166, capability=80),
        Entry(64, Tile(1, 64, 64, 64, num_warps=8, num_stages=2), rdna=True),
    ),
    whole=("half",),
    shares_rows=True,
)


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def rotate_kernel(
    x_ptr, stage_ptr, factor_ptr, y_ptr, n_rows, d, rows_per_program,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BANDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """y = x S, or x S^T, a range of rows and of positions per program.

    In half precision y = x + x (S - I), because the entries of S near 1 would round badly.

    Args:
        x_ptr: (n_rows, d); any float dtype.
        stage_ptr: (d/SIZE, SIZE, SIZE) matrices of the groups; float32 or float64.
        factor_ptr: (n_rows,), of each row of y; float32 or float64. None counts as ones.
        y_ptr: (n_rows, d) result; dtype of x.
        n_rows: rows of x.
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
        INNER: entries of a group summed over per step; at least SIZE in half precision.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    RESIDUAL: tl.constexpr = dtype.primitive_bitwidth < 32
    sum_dtype: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    WHOLE: tl.constexpr = INNER >= SIZE  # one tile of the stage serves all rows
    group, part, first = program(d, SIZE, (SIZE + COLUMNS - 1) // COLUMNS, COLUMNS, BANDS)
    first *= rows_per_program
    offset = part * COLUMNS
    last = tl.minimum(first + rows_per_program, n_rows)
    column, column_inside = positions(group, offset, d, SIZE, COLUMNS, BANDS)
    row = tl.arange(0, ROWS)
    out = offsets(row, column, d, SIZE, CHUNK, STRIDE, BANDS)
    if WHOLE:
        inner, inner_inside = positions(group, 0, d, SIZE, INNER, BANDS)
        into = offsets(row, inner, d, SIZE, CHUNK, STRIDE, BANDS)
        stage = load_stage(
            stage_ptr, inner, inner_inside, column, column_inside, dtype,
            SIZE, TRANSPOSE, INTERPRETED, BANDS,
        )  # fmt: skip
    for start in range(first, last, ROWS):
        base = start * d
        there = rows_axis(row < last - start, BANDS)
        out_mask = there & column_inside[None]
        if WHOLE:
            mask = there & inner_inside[None]
            x = tl.load(x_ptr + base + into, mask=mask, other=0.0)
            if not RESIDUAL:
                y = tl.zeros(out.shape, sum_dtype)
            elif COLUMNS == INNER:
                y = x.to(sum_dtype)
            else:
                y = tl.load(x_ptr + base + out, mask=out_mask, other=0.0).to(sum_dtype)
            y = product(x, stage, y, BANDS, INTERPRETED)
        else:
            tl.static_assert(not RESIDUAL)
            y = tl.zeros(out.shape, sum_dtype)
            for k in range(0, SIZE, INNER):
                inner, inner_inside = positions(group, k, d, SIZE, INNER, BANDS)
                into = offsets(row, inner, d, SIZE, CHUNK, STRIDE, BANDS)
                mask = there & inner_inside[None]
                x = tl.load(x_ptr + base + into, mask=mask, other=0.0)
                stage = load_stage(
                    stage_ptr, inner, inner_inside, column, column_inside, dtype,
                    SIZE, TRANSPOSE, INTERPRETED, BANDS,
                )  # fmt: skip
                y = product(x, stage, y, BANDS, INTERPRETED)
        if factor_ptr is not None:
            factor = tl.load(factor_ptr + start + row, mask=row < last - start, other=0.0)
            y *= rows_axis(factor, BANDS)
        tl.store(y_ptr + base + out, round_to(y, dtype, INTERPRETED), mask=out_mask)


def rotate(
    x: torch.Tensor,
    stage: torch.Tensor,
    chunk: int,
    stride: int,
    transpose: bool,
    factor: torch.Tensor | None = None,
    *,
    tile: MeasuredTile = (),
) -> torch.Tensor:
    """Launch ``rotate_kernel``. The caller checks dtypes and devices.

    Args:
        x: (N, d).
        stage: (d/size, size, size) matrices of the groups.
        chunk: neighboring features of a group.
        stride: groups whose chunks alternate.
        transpose: True to multiply by the transposed matrices.
        factor: (N,), of each row of the result, or None for ones.
        tile: measured fields of ``Tile``.

    Returns:
        Rotated rows, like x.

    Raises:
        ValueError: a shape is not the one above.
    """
    size = stage.shape[-1]
    expect("stage", stage, x.shape[1] // size, size, size)
    x, stage = x.contiguous(), stage.contiguous()
    if factor is not None:
        expect("factor", factor, x.shape[0])
        factor = factor.contiguous()
    y = torch.empty_like(x)
    structure = size, chunk, stride, transpose
    _rotate_launch(x.get_device(), x.dtype, *x.shape, *structure, tile)(x, stage, factor, y)
    return y


@lru_cache(LAUNCHES)
def _rotate_launch(
    device: int, dtype: torch.dtype, n: int, d: int,
    size: int, chunk: int, stride: int, transpose: bool, measured: MeasuredTile, shrink: int = 0,
) -> Launch | None:  # fmt: skip
    """Launch in the default or measured tile, or in one that is ``shrink`` times smaller."""
    limits = limits_of(device)
    tile = tile_for(TILES, limits, dtype, size, chunk, stride, measured, shrink)
    if tile is None:
        return None
    n_tiles = count_tiles(tile, d, size, tile.columns)
    # A program begins by reading size^2 numbers of the stage, and then rows * size of x at a time.
    start = 1 + size / tile.rows
    slots = limits.multiprocessors * tile.programs
    rows = tile.rows * turns_for(n_tiles, cdiv(n, tile.rows), slots, start)
    structure = {"SIZE": size, "CHUNK": chunk, "STRIDE": stride, "TRANSPOSE": transpose}
    smaller = partial(
        _rotate_launch, device, dtype, n, d, size, chunk, stride, transpose, measured, shrink + 1
    )
    grid = n_tiles * cdiv(n, rows)
    return launch_with(device, tile, rotate_kernel, grid, (n, d, rows), structure, smaller)


def tile_for(
    tiles: TileTable, limits: Limits, dtype: torch.dtype, size: int, chunk: int, stride: int,
    measured: MeasuredTile, shrink: int,
) -> Tile | None:  # fmt: skip
    """Default tile with its measured fields replaced, or one that is ``shrink`` times smaller.

    None if there is no such tile. A measured one is never made smaller, as the device has run it.
    """
    structure = {"size": size, "chunk": chunk, "stride": stride}
    name = str(dtype).removeprefix("torch.")
    tile = tiles.default(structure, name, limits)
    if tile is not None and measured:
        return tile._replace(**dict(measured)) if shrink == 0 else None
    for _ in range(shrink):
        tile = None if tile is None else tiles.smaller(tile, structure, name)
    return tile


def count_tiles(tile: Tile, d: int, size: int, *widths: int) -> int:
    """Programs that one range of rows takes, with groups cut into tiles of these widths."""
    width = tile.bands * max(size, tile.columns // size * size)
    return cdiv(d, width) * math.prod(cdiv(size, width) for width in widths)


def launch_with(
    device: int, tile: Tile, kernel: Any, grid: int, scalars: tuple[int, ...],
    structure: dict[str, Any], smaller: Callable[[], Launch | None],
) -> Launch:  # fmt: skip
    """Launch of a kernel with a tile.

    Args:
        structure: the other constexpr arguments of the kernel.
        device, smaller: as for ``Launch``.
    """
    constants = structure | constants_of(tile) | {"INTERPRETED": INTERPRETED}
    options = tile.num_warps, tile.num_stages
    return Launch(kernel, grid, scalars, constants, *options, device, smaller)
