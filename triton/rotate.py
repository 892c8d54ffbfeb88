"""Rows times a stage, and its gradients, in Triton: the kernels that touch the activations.

groups.py says how tiles, positions and groups belong together; config_rotate.py has the tiles.
"""

import math
import os

import torch
import triton
import triton.language as tl

from .config import tuned
from .config_rotate import Tile, config_for, constants_of
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
from .launch import Launch, cdiv, remembered

# Arithmetic of halves in Triton's interpreter needs help. @triton.jit, too, reads this on import.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Programs that keep a large GPU busy, below which a program takes fewer rows than it could
PROGRAMS = 1024


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def rotate_kernel(
    x_ptr, stage_ptr, y_ptr, n_rows, d, rows_per_program,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BANDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """y = x S (TRANSPOSE: x S^T); of halves, y = x + x (S - I), as S itself would round badly."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    RESIDUAL: tl.constexpr = dtype.primitive_bitwidth < 32
    sum_dtype: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    WHOLE: tl.constexpr = INNER >= SIZE  # one tile of the stage, which stays for all rows
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
        tl.store(y_ptr + base + out, round_to(y, dtype, INTERPRETED), mask=out_mask)


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def rotate_backward_kernel(
    x_ptr, grad_ptr, stage_ptr, x_grad_ptr, partials_ptr, n_rows, d, rows_per_program,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSE: tl.constexpr,
    INTERPRETED: tl.constexpr, X_GRAD: tl.constexpr,
    BANDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Gram of x (COLUMNS entries) and grad (INNER) over a split of the rows; X_GRAD: x_grad too.

    With y = x A, A = S or S^T: x_grad = grad A^T, dA = x^T grad. X_GRAD needs INNER >= SIZE.
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


def rotate(
    x: torch.Tensor, stage: torch.Tensor, chunk: int, stride: int, transpose: bool
) -> torch.Tensor:
    """x (N, d) times a stage (d/size, size, size), or its transpose; checked by the caller."""
    x, stage = x.contiguous(), stage.contiguous()
    y = torch.empty_like(x)
    structure = stage.shape[-1], chunk, stride, transpose
    _rotate_launch(x.get_device(), x.dtype, *x.shape, *structure)(x, stage, y)
    return y


@remembered
def _rotate_launch(
    device: int, dtype: torch.dtype, n: int, d: int,
    size: int, chunk: int, stride: int, transpose: bool,
) -> Launch:  # fmt: skip
    tile = _tile("rotate", device, dtype, n, d, size, chunk, stride)
    n_tiles = _n_tiles(tile, d, size, tile.columns)
    row_tiles = cdiv(n, tile.rows)
    # a program reads size^2 of the stage for rows * size of x: 16 * size rows make that cheap
    most = max(256, 16 * size) // tile.rows
    rows = tile.rows * max(1, min(most, n_tiles * row_tiles // _programs(size)))
    structure = {"SIZE": size, "CHUNK": chunk, "STRIDE": stride, "TRANSPOSE": transpose}
    return _launch_of(rotate_kernel, n_tiles * cdiv(n, rows), (n, d, rows), structure, tile)


def rotate_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    stage: torch.Tensor,
    chunk: int,
    stride: int,
    transpose: bool,
    splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``rotate``: of x, and of the stage as partial sums (splits, *stage.shape).

    Large groups take two launches: their Gram alone fills a program's registers.
    """
    structure = stage.shape[-1], chunk, stride
    launch = _backward_launch(x.get_device(), x.dtype, *x.shape, splits, *structure, transpose)
    if launch is None:
        pair = (grad, x) if transpose else (x, grad)
        partials = gram(*pair, *structure, splits)
        return rotate(grad, stage, chunk, stride, not transpose), partials
    grad, stage = grad.contiguous(), stage.contiguous()
    x_grad = torch.empty_like(grad)
    return x_grad, _partials(launch, x, grad, stage, x_grad, stage.shape[-1], splits)


def gram(
    x: torch.Tensor, grad: torch.Tensor, size: int, chunk: int, stride: int, splits: int
) -> torch.Tensor:
    """Partial sums over the rows, (splits, d/size, size, size), of x^T grad in each group."""
    launch = _gram_launch(x.get_device(), x.dtype, *x.shape, splits, size, chunk, stride)
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
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0:
        return x.new_zeros(shape, dtype=dtype)
    partials = x.new_empty(shape, dtype=dtype)
    launch(x, grad, stage, x_grad, partials)
    return partials


@remembered
def _backward_launch(
    device: int, dtype: torch.dtype, n: int, d: int, splits: int,
    size: int, chunk: int, stride: int, transpose: bool,
) -> Launch | None:  # fmt: skip
    """None: groups that take two launches."""
    tile = _tile("rotate_backward", device, dtype, n, d, size, chunk, stride)
    if tile is None:
        return None
    structure = {"SIZE": size, "CHUNK": chunk, "STRIDE": stride, "TRANSPOSE": transpose}
    return _gram_of(n, d, splits, structure | {"X_GRAD": True}, tile)


@remembered
def _gram_launch(
    device: int, dtype: torch.dtype, n: int, d: int, splits: int,
    size: int, chunk: int, stride: int,
) -> Launch:  # fmt: skip
    tile = _tile("gram", device, dtype, n, d, size, chunk, stride)
    structure = {"SIZE": size, "CHUNK": chunk, "STRIDE": stride, "TRANSPOSE": False}
    return _gram_of(n, d, splits, structure | {"X_GRAD": False}, tile)


def _gram_of(n: int, d: int, splits: int, structure: dict, tile: Tile) -> Launch:
    rows = cdiv(cdiv(n, splits), tile.rows) * tile.rows
    grid = splits * _n_tiles(tile, d, structure["SIZE"], tile.columns, tile.inner)
    return _launch_of(rotate_backward_kernel, grid, (n, d, rows), structure, tile)


def _programs(size: int) -> int:
    """How many programs are wanted; each reads a part of the stage first, more of a large one."""
    return max(1, PROGRAMS if size <= 64 else PROGRAMS // 2 if size <= 128 else PROGRAMS // 8)


def _tile(
    op: str, device: int, dtype: torch.dtype, n: int, d: int, size: int, chunk: int, stride: int
) -> Tile | None:
    name = str(dtype).removeprefix("torch.")
    tile = config_for(op, size=size, chunk=chunk, stride=stride, dtype=name)
    return None if tile is None else tuned(tile, op, device, dtype, (size, chunk, stride), (n, d))


def _n_tiles(tile: Tile, d: int, size: int, *widths: int) -> int:
    """Programs that one range of rows takes, with groups cut into tiles of these widths."""
    width = tile.bands * max(size, tile.columns // size * size)
    return cdiv(d, width) * math.prod(cdiv(size, width) for width in widths)


def _launch_of(kernel, grid: int, scalars: tuple, structure: dict, tile: Tile) -> Launch:
    constants = structure | constants_of(tile) | {"INTERPRETED": INTERPRETED}
    return Launch(kernel, grid, scalars, constants, tile.num_warps, tile.num_stages)
