"""Triton kernel of the gradients of rows times a stage."""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl

from .config_rotate import Entry, Tile, TileTable
from .groups import (
    columns_axis,
    entry,
    gram_of,
    inner_axis,
    load_stage,
    offsets,
    positions,
    product,
    program,
    round_to,
    rows_axis,
    same_group,
)
from .launch import COMPUTE, LAUNCHES, Launch, MeasuredTile, cdiv, expect
from .limits import limits_of
from .rotate import count_tiles, launch_with, rotate, tile_for

# inner must hold a whole group. Larger groups have no tile: the gradients of x and of the stage
# take a launch each.
BACKWARD_TILES = TileTable(
    half=(
        Entry(64, Tile(1, 32, 64, 64, num_warps=8, num_stages=2), rdna=True),
        Entry(128, Tile(1, 32, 32, 128, num_warps=8, num_stages=1), rdna=True),
        Entry(64, Tile(1, 64, 64, 64, num_warps=8, num_stages=3), 65),
        Entry(128, Tile(1, 64, 128, 128, num_warps=8, num_stages=3), 137, capability=90),
        Entry(128, Tile(1, 64, 64, 128, num_warps=8, num_stages=1), 48),
    ),
    float32=(
        Entry(16, Tile(4, 32, 16, 16, num_warps=4, num_stages=1)),
        Entry(32, Tile(1, 32, 32, 32, num_warps=4, num_stages=2)),
        Entry(64, Tile(1, 32, 32, 64, num_warps=8, num_stages=1)),
    ),
    float64=(
        Entry(16, Tile(4, 16, 16, 16, num_warps=4, num_stages=1)),
        Entry(32, Tile(1, 16, 32, 32, num_warps=4, num_stages=1)),
    ),
    strided=(
        Entry(16, Tile(4, 32, 16, 16, num_warps=4, num_stages=3)),
        Entry(32, Tile(4, 16, 32, 32, num_warps=4, num_stages=2), rdna=True),
        Entry(32, Tile(4, 32, 32, 32, num_warps=4, num_stages=2), 49),
        Entry(64, Tile(1, 32, 64, 64, num_warps=8, num_stages=2), rdna=True),
        Entry(64, Tile(1, 64, 64, 64, num_warps=8, num_stages=2), 48),
    ),
    whole=("half", "float32", "float64"),
    shares_rows=False,
)
STAGE_GRAD_TILES = TileTable(
    half=(
        Entry(32, Tile(1, 64, 64, 64, num_warps=8, num_stages=3), 49),
        Entry(64, Tile(1, 64, 64, 64, num_warps=8, num_stages=2), rdna=True),
        Entry(64, Tile(1, 64, 64, 64, num_warps=4, num_stages=3), 49),
        Entry(256, Tile(1, 64, 128, 128, num_warps=16, num_stages=1), rdna=True),
        Entry(128, Tile(1, 64, 128, 128, num_warps=8, num_stages=4), 129, capability=90),
        Entry(256, Tile(1, 64, 128, 128, num_warps=8, num_stages=3), 97, capability=90),
        Entry(256, Tile(1, 64, 128, 128, num_warps=8, num_stages=2), 65),
    ),
    float32=(
        Entry(16, Tile(4, 32, 16, 16, num_warps=4, num_stages=1)),
        Entry(32, Tile(1, 16, 32, 32, num_warps=4, num_stages=2)),
        Entry(256, Tile(1, 16, 64, 32, num_warps=4, num_stages=2)),
    ),
    float64=(
        Entry(16, Tile(4, 16, 16, 16, num_warps=4, num_stages=1)),
        Entry(256, Tile(1, 16, 32, 32, num_warps=4, num_stages=1)),
    ),
    strided=(
        Entry(16, Tile(4, 32, 16, 16, num_warps=4, num_stages=3)),
        Entry(32, Tile(4, 16, 32, 32, num_warps=4, num_stages=2)),
    ),
    whole=(),
    shares_rows=False,
)


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def rotate_backward_kernel(
    x_ptr, grad_ptr, stage_ptr, x_grad_ptr, partials_ptr, n_rows, d, rows_per_program,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSE: tl.constexpr,
    INTERPRETED: tl.constexpr, X_GRAD: tl.constexpr,
    BANDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Gradient of the stage over a split of the rows and, if X_GRAD, of these rows of x.

    With y = x A, A = S or S^T: x_grad = grad A^T, and the gradient of A is x^T grad in each group.

    Args:
        x_ptr: (n_rows, d); any float dtype.
        grad_ptr: (n_rows, d) gradient of y; dtype of x.
        stage_ptr: (d/SIZE, SIZE, SIZE) matrices of the groups; float32 or float64. None unless
            X_GRAD.
        x_grad_ptr: (n_rows, d) result; dtype of x. None unless X_GRAD.
        partials_ptr: (splits, d/SIZE, SIZE, SIZE) result, a partial sum of the gradient of S for
            each split; float32, or float64 if x is.
        n_rows: rows of x.
        d: features of x.
        rows_per_program: rows of a split, a multiple of ROWS.
        SIZE: features of a group.
        CHUNK: neighboring features of a group.
        STRIDE: groups whose chunks alternate; 1 if a group is contiguous.
        TRANSPOSE: True if A = S^T.
        INTERPRETED: True in Triton's interpreter.
        X_GRAD: True for the gradient of x too; needs INNER >= SIZE.
        BANDS: bands per program (config_rotate.Tile).
        ROWS: rows per step.
        COLUMNS: entries of a group taken from x.
        INNER: entries of a group taken from grad.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    RESIDUAL: tl.constexpr = dtype.primitive_bitwidth < 32
    sum_dtype: tl.constexpr = partials_ptr.dtype.element_ty
    across: tl.constexpr = (SIZE + INNER - 1) // INNER
    parts: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS * across
    group, part, split = program(d, SIZE, parts, COLUMNS, BANDS)
    left_offset = part // across * COLUMNS
    right_offset = part % across * INNER
    first = split * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    left, left_inside = positions(group, left_offset, d, SIZE, COLUMNS, BANDS)
    right, right_inside = positions(group, right_offset, d, SIZE, INNER, BANDS)
    row = tl.arange(0, ROWS)
    left_at = offsets(row, left, d, SIZE, CHUNK, STRIDE, BANDS)
    right_at = offsets(row, right, d, SIZE, CHUNK, STRIDE, BANDS)
    if X_GRAD:
        stage = load_stage(
            stage_ptr, right, right_inside, left, left_inside, dtype,
            SIZE, not TRANSPOSE, INTERPRETED, BANDS,
        )  # fmt: skip
    at = entry(inner_axis(left, BANDS), columns_axis(right, BANDS), SIZE, TRANSPOSE)
    gram = tl.zeros(at.shape, sum_dtype)
    for start in range(first, last, ROWS):
        base = start * d
        there = rows_axis(row < last - start, BANDS)
        left_mask = there & left_inside[None]
        right_mask = there & right_inside[None]
        x = tl.load(x_ptr + base + left_at, mask=left_mask, other=0.0)
        grad = tl.load(grad_ptr + base + right_at, mask=right_mask, other=0.0)
        if X_GRAD:
            if not RESIDUAL:
                x_grad = tl.zeros(left_at.shape, sum_dtype)
            elif COLUMNS == INNER:
                x_grad = grad.to(sum_dtype)
            else:
                x_grad = tl.load(grad_ptr + base + left_at, mask=left_mask, other=0.0)
                x_grad = x_grad.to(sum_dtype)
            x_grad = product(grad, stage, x_grad, BANDS, INTERPRETED)
            x_grad = round_to(x_grad, dtype, INTERPRETED)
            tl.store(x_grad_ptr + base + left_at, x_grad, mask=left_mask)
        gram = gram_of(x, grad, gram, BANDS, INTERPRETED)
    inside = inner_axis(left_inside, BANDS) & columns_axis(right_inside, BANDS)
    inside = same_group(inner_axis(left, BANDS), columns_axis(right, BANDS), inside, SIZE, COLUMNS)
    tl.store(partials_ptr + split * d * SIZE + at, gram, mask=inside)


def rotate_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    stage: torch.Tensor,
    chunk: int,
    stride: int,
    transpose: bool,
    splits: int,
    *,
    tile: MeasuredTile = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``rotate_backward_kernel``. The caller checks dtypes and devices.

    Large groups take two launches, ``rotate`` and ``rotate_stage_grad`` with their default tiles:
    their x^T grad alone fills the registers of a program.

    Args:
        grad: (N, d) gradient of the rotated rows.
        x: (N, d).
        stage: (d/size, size, size) matrices of the groups.
        chunk: neighboring features of a group.
        stride: groups whose chunks alternate.
        transpose: as in the forward.
        splits: number of ranges of the rows, each with a partial sum.
        tile: measured fields of ``Tile``.

    Returns:
        Gradient of x, and partial sums (splits, d/size, size, size) of the gradient of the stage,
        in float64 if x is, else float32.

    Raises:
        ValueError: a shape is not the one above.
    """
    size = stage.shape[-1]
    expect("grad", grad, *x.shape)
    expect("stage", stage, x.shape[1] // size, size, size)
    structure = size, chunk, stride
    shape = x.get_device(), x.dtype, *x.shape
    launch = _backward_launch(*shape, splits, *structure, transpose, tile)
    if launch is None:
        pair = (grad, x) if transpose else (x, grad)
        partials = rotate_stage_grad(*pair, *structure, splits)
        return rotate(grad, stage, chunk, stride, not transpose), partials
    grad, stage = grad.contiguous(), stage.contiguous()
    x_grad = torch.empty_like(grad)
    return x_grad, _partials(launch, x, grad, stage, x_grad, stage.shape[-1], splits)


def rotate_stage_grad(
    x: torch.Tensor,
    grad: torch.Tensor,
    size: int,
    chunk: int,
    stride: int,
    splits: int,
    *,
    tile: MeasuredTile = (),
) -> torch.Tensor:
    """Launch ``rotate_backward_kernel`` for x^T grad in each group alone.

    Args:
        x: (N, d).
        grad: (N, d).
        size: features of a group.
        chunk: neighboring features of a group.
        stride: groups whose chunks alternate.
        splits: number of ranges of the rows, each with a partial sum.
        tile: measured fields of ``Tile``.

    Returns:
        Partial sums (splits, d/size, size, size), in float64 if x is, else float32.

    Raises:
        ValueError: a shape is not the one above.
    """
    expect("grad", grad, *x.shape)
    shape = x.get_device(), x.dtype, *x.shape
    launch = _stage_grad_launch(*shape, splits, size, chunk, stride, tile)
    return _partials(launch, x, grad.contiguous(), None, None, size, splits)


def _partials(
    launch: Launch,
    x: torch.Tensor,
    grad: torch.Tensor,
    stage: torch.Tensor | None,
    x_grad: torch.Tensor | None,
    size: int,
    splits: int,
) -> torch.Tensor:
    x = x.contiguous()
    shape = splits, x.shape[1] // size, size, size
    dtype = COMPUTE[x.dtype]
    if x.numel() == 0:
        return x.new_zeros(shape, dtype=dtype)
    partials = x.new_empty(shape, dtype=dtype)
    launch(x, grad, stage, x_grad, partials)
    return partials


@lru_cache(LAUNCHES)
def _backward_launch(
    device: int, dtype: torch.dtype, n: int, d: int, splits: int,
    size: int, chunk: int, stride: int, transpose: bool, measured: MeasuredTile, shrink: int = 0,
) -> Launch | None:  # fmt: skip
    """Launch for both gradients, or None if such groups take two launches."""
    layout = size, chunk, stride
    tile = tile_for(BACKWARD_TILES, limits_of(device), dtype, *layout, measured, shrink)
    if tile is None:
        return None
    smaller = partial(
        _backward_launch, device, dtype, n, d, splits, *layout, transpose, measured, shrink + 1
    )
    structure = {"SIZE": size, "CHUNK": chunk, "STRIDE": stride, "TRANSPOSE": transpose}
    structure["X_GRAD"] = True
    return _launch_in_splits(device, tile, n, d, splits, structure, smaller)


@lru_cache(LAUNCHES)
def _stage_grad_launch(
    device: int, dtype: torch.dtype, n: int, d: int, splits: int,
    size: int, chunk: int, stride: int, measured: MeasuredTile, shrink: int = 0,
) -> Launch | None:  # fmt: skip
    """Launch for the gradient of the stage, or None if no tile is so many times smaller."""
    layout = size, chunk, stride
    tile = tile_for(STAGE_GRAD_TILES, limits_of(device), dtype, *layout, measured, shrink)
    if tile is None:
        return None
    smaller = partial(
        _stage_grad_launch, device, dtype, n, d, splits, *layout, measured, shrink + 1
    )
    structure = {"SIZE": size, "CHUNK": chunk, "STRIDE": stride, "TRANSPOSE": False}
    structure["X_GRAD"] = False
    return _launch_in_splits(device, tile, n, d, splits, structure, smaller)


def _launch_in_splits(
    device: int, tile: Tile, n: int, d: int, splits: int, structure: dict,
    smaller: Callable[[], Launch | None],
) -> Launch:  # fmt: skip
    rows = cdiv(cdiv(n, splits), tile.rows) * tile.rows
    grid = splits * count_tiles(tile, d, structure["SIZE"], tile.columns, tile.inner)
    scalars = n, d, rows
    return launch_with(device, tile, rotate_backward_kernel, grid, scalars, structure, smaller)
