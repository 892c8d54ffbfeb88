"""Triton kernels of y = scale * (x - center) + bias and its gradients, one pass over the rows."""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from .config_scale import BACKWARD, FORWARD, PROGRAMS, ScaleConfig
from .groups import round_to
from .launch import COMPUTE, LAUNCHES, Launch, MeasuredTile, cdiv, expect
from .limits import limits_of
from .rotate import INTERPRETED


@triton.jit
def _columns(ptr, column, inside, dtype: tl.constexpr):
    """Load entries of a vector as dtype.

    Half precision goes through float32, because the interpreter cannot convert it directly.
    """
    value = tl.load(ptr + column, mask=inside, other=0.0)
    return value if value.dtype == tl.float64 else value.to(tl.float32).to(dtype)


@triton.jit(do_not_specialize=["n_rows"])
def scale_kernel(
    x_ptr, scale_ptr, center_ptr, bias_ptr, y_ptr, n_rows, n,
    INTERPRETED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = scale * (x - center) + bias, ROWS x COLUMNS numbers per program.

    The shift bias - scale * center is computed first, so it is exactly 0 where scale is 1 and bias
    equals center.

    Args:
        x_ptr: (n_rows, n); any float dtype.
        scale_ptr: (n,); any float dtype.
        center_ptr: (n,); any float dtype. None counts as 0, and if bias_ptr is None.
        bias_ptr: (n,); any float dtype. None for scale * x.
        y_ptr: (n_rows, n) result; dtype of x.
        n_rows: rows of x.
        n: features of x.
        INTERPRETED: True in Triton's interpreter (``round_to``).
        ROWS: rows per program.
        COLUMNS: features per program.
    """
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = (n + COLUMNS - 1) // COLUMNS
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    inside = column < n
    mask = (row < n_rows - first)[:, None] & inside[None, :]
    at = first * n + row[:, None] * n + column[None, :]
    scale = _columns(scale_ptr, column, inside, dtype)
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(dtype) * scale[None, :]
    if bias_ptr is not None:
        bias = _columns(bias_ptr, column, inside, dtype)
        if center_ptr is not None:
            bias -= scale * _columns(center_ptr, column, inside, dtype)
        y += bias[None, :]
    tl.store(y_ptr + at, round_to(y, y_ptr.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def scale_backward_kernel(
    grad_ptr, x_ptr, scale_ptr, center_ptr, x_grad_ptr, sums_ptr, n_rows, n, rows_per_program,
    INTERPRETED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x_grad = scale * grad, and partial gradients of scale and bias, in COLUMNS features.

    A program takes the rows of one split: it writes their x_grad, and their sums of
    grad * (x - center), the gradient of the scale, and of grad, that of the bias. Without a scale
    it writes no x_grad, and reads only.

    Args:
        grad_ptr: (n_rows, n) gradient of y; any float dtype.
        x_ptr: (n_rows, n); any float dtype.
        scale_ptr: (n,); any float dtype. None if x_grad is not wanted.
        center_ptr: (n,); any float dtype. None counts as 0.
        x_grad_ptr: (n_rows, n) result; dtype of x. None without a scale.
        sums_ptr: (splits, 2, n) results; float32, or float64 if x is.
        n_rows: rows of x.
        n: features of x.
        rows_per_program: rows of a split, a multiple of ROWS.
        INTERPRETED: True in Triton's interpreter (``round_to``).
        ROWS: rows per step.
        COLUMNS: features per program.
    """
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    blocks = (n + COLUMNS - 1) // COLUMNS
    split = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    if scale_ptr is not None:
        scale = _columns(scale_ptr, column, inside, dtype)
    if center_ptr is not None:
        center = _columns(center_ptr, column, inside, dtype)
    # Summed over the rows of the tile at the very end: until then each thread needs only its own
    # numbers.
    scale_sum = tl.zeros([ROWS, COLUMNS], dtype)
    bias_sum = tl.zeros([ROWS, COLUMNS], dtype)
    first = split * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    row = tl.arange(0, ROWS)
    offset = row[:, None] * n + column[None, :]
    for start in range(first, last, ROWS):
        mask = (row < last - start)[:, None] & inside[None, :]
        at = start * n + offset
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(dtype)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(dtype)
        if scale_ptr is not None:
            x_grad = round_to(grad * scale[None, :], x_grad_ptr.dtype.element_ty, INTERPRETED)
            tl.store(x_grad_ptr + at, x_grad, mask=mask)
        if center_ptr is not None:
            x -= center[None, :]
        scale_sum += grad * x
        bias_sum += grad
    tl.store(sums_ptr + split * 2 * n + column, tl.sum(scale_sum, axis=0), mask=inside)
    tl.store(sums_ptr + split * 2 * n + n + column, tl.sum(bias_sum, axis=0), mask=inside)


def scale(
    x: torch.Tensor,
    scale: torch.Tensor,
    center: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    tile: MeasuredTile = (),
) -> torch.Tensor:
    """Launch ``scale_kernel``. The caller checks dtypes and devices.

    Args:
        x: (N, n).
        scale: (n,).
        center: (n,), or None for 0. Not used without a bias.
        bias: (n,), or None for scale * x.
        tile: measured fields of ``ScaleConfig``.

    Returns:
        scale * (x - center) + bias, like x.

    Raises:
        ValueError: a shape is not the one above.
    """
    for name, vector in (("scale", scale), ("center", center), ("bias", bias)):
        expect(name, vector, x.shape[1])
    x, scale = x.contiguous(), scale.contiguous()
    if bias is None:
        center = None
    else:
        center = None if center is None else center.contiguous()
        bias = bias.contiguous()
    y = torch.empty_like(x)
    _scale_launch(*x.shape, tile)(x, scale, center, bias, y)
    return y


@lru_cache(LAUNCHES)
def _scale_launch(n_rows: int, n: int, tile: MeasuredTile) -> Launch:
    config = FORWARD.config._replace(**dict(tile))
    grid = cdiv(n, config.COLUMNS) * cdiv(n_rows, config.ROWS)
    return _launch_with(config, scale_kernel, grid, (n_rows, n))


def scale_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    center: torch.Tensor | None,
    *,
    tile: MeasuredTile = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch ``scale_backward_kernel``. The caller checks dtypes and devices.

    Args:
        grad: (N, n) gradient of y.
        x: (N, n).
        scale: (n,), or None if the gradient of x is not wanted.
        center: (n,), or None for 0.
        tile: measured fields of ``ScaleConfig``.

    Returns:
        Gradients of x, like x, or (0, n) without a scale; and of scale and bias, in the dtype of
        scale, or in at least float32 without one.

    Raises:
        ValueError: a shape is not the one above.
    """
    expect("grad", grad, *x.shape)
    expect("scale", scale, x.shape[1])
    expect("center", center, x.shape[1])
    grad, x = grad.contiguous(), x.contiguous()
    scale = None if scale is None else scale.contiguous()
    center = None if center is None else center.contiguous()
    sum_dtype = COMPUTE[x.dtype]
    dtype = sum_dtype if scale is None else scale.dtype
    x_grad = torch.empty_like(x) if scale is not None else x.new_empty(0, x.shape[1])
    if x.numel() == 0:
        return x_grad, *x.new_zeros(2, x.shape[1], dtype=dtype)
    splits, launch = _backward_launch(x.get_device(), *x.shape, tile)
    sums = x.new_empty(splits, 2, x.shape[1], dtype=sum_dtype)
    launch(grad, x, scale, center, None if scale is None else x_grad, sums)
    scale_grad, bias_grad = sums.sum(0)
    if dtype != sum_dtype:
        scale_grad, bias_grad = scale_grad.to(dtype), bias_grad.to(dtype)
    return x_grad, scale_grad, bias_grad


@lru_cache(LAUNCHES)
def _backward_launch(device: int, n_rows: int, n: int, tile: MeasuredTile) -> tuple[int, Launch]:
    """Number of splits of the rows, each with partial sums, and the launch."""
    config = BACKWARD.config._replace(**dict(tile))
    blocks = cdiv(n, config.COLUMNS)
    programs = PROGRAMS * limits_of(device).multiprocessors
    splits = max(1, min(cdiv(programs, blocks), cdiv(n_rows, config.ROWS)))
    rows = cdiv(cdiv(n_rows, splits), config.ROWS) * config.ROWS
    return splits, _launch_with(config, scale_backward_kernel, blocks * splits, (n_rows, n, rows))


def _launch_with(config: ScaleConfig, kernel: Any, grid: int, scalars: tuple[int, ...]) -> Launch:
    constants = {"INTERPRETED": INTERPRETED, "ROWS": config.ROWS, "COLUMNS": config.COLUMNS}
    return Launch(kernel, grid, scalars, constants, config.num_warps, config.num_stages)
