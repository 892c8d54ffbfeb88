"""y = scale * (x - center) + bias in Triton, and its gradients, in one pass over the rows."""

import torch
import triton
import triton.language as tl

from .config import tuned
from .config_scale import PROGRAMS, ScaleConfig, config_for
from .groups import round_to
from .launch import Launch, cdiv, remembered
from .rotate import INTERPRETED


@triton.jit
def _columns(ptr, column, inside, dtype: tl.constexpr):
    """Some entries of a vector; a half goes through float32, as the interpreter wants it."""
    value = tl.load(ptr + column, mask=inside, other=0.0)
    return value if value.dtype == tl.float64 else value.to(tl.float32).to(dtype)


@triton.jit(do_not_specialize=["n_rows"])
def scale_kernel(
    x_ptr, scale_ptr, center_ptr, bias_ptr, y_ptr, n_rows, n,
    INTERPRETED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Without a bias there is no center. The shift is exactly 0 where scale is 1 and both agree."""
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
        y += (bias - scale * _columns(center_ptr, column, inside, dtype))[None, :]
    tl.store(y_ptr + at, round_to(y, y_ptr.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def scale_backward_kernel(
    grad_ptr, x_ptr, scale_ptr, center_ptr, x_grad_ptr, sums_ptr, n_rows, n, rows_per_program,
    INTERPRETED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of x_grad, and their sums over a split of the rows: grad (x - center), grad."""
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    blocks = (n + COLUMNS - 1) // COLUMNS
    split = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    scale = _columns(scale_ptr, column, inside, dtype)
    if center_ptr is not None:
        center = _columns(center_ptr, column, inside, dtype)
    # summed over the rows of a tile at the very end: before, no thread needs another's numbers
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
) -> torch.Tensor:
    """scale * (x - center) + bias for x (N, n), vectors (n,); checked by the caller."""
    x, scale = x.contiguous(), scale.contiguous()
    if bias is None:
        center = None
    else:
        center, bias = center.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    _scale_launch(x.get_device(), x.dtype, *x.shape)(x, scale, center, bias, y)
    return y


@remembered
def _scale_launch(device: int, dtype: torch.dtype, n_rows: int, n: int) -> Launch:
    config = tuned(config_for("scale"), "scale", device, dtype, (), (n_rows, n))
    grid = cdiv(n, config.COLUMNS) * cdiv(n_rows, config.ROWS)
    return _launch_of(scale_kernel, grid, (n_rows, n), config)


def scale_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, center: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (N, n), scale and bias (n,) from grad (N, n); checked by the caller."""
    grad, x, scale = grad.contiguous(), x.contiguous(), scale.contiguous()
    center = None if center is None else center.contiguous()
    x_grad = torch.empty_like(x)
    if x.numel() == 0:
        return x_grad, torch.zeros_like(scale), torch.zeros_like(scale)
    splits, launch = _backward_launch(x.get_device(), x.dtype, *x.shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = x.new_empty(splits, 2, x.shape[1], dtype=wide)
    launch(grad, x, scale, center, x_grad, sums)
    scale_grad, bias_grad = sums.sum(0)
    if scale.dtype != wide:
        scale_grad, bias_grad = scale_grad.to(scale.dtype), bias_grad.to(scale.dtype)
    return x_grad, scale_grad, bias_grad


@remembered
def _backward_launch(device: int, dtype: torch.dtype, n_rows: int, n: int) -> tuple[int, Launch]:
    """Partial sums that the launch writes, and the launch."""
    op = "scale_backward"
    config = tuned(config_for(op), op, device, dtype, (), (n_rows, n))
    blocks = cdiv(n, config.COLUMNS)
    splits = max(1, min(cdiv(PROGRAMS, blocks), cdiv(n_rows, config.ROWS)))
    rows = cdiv(cdiv(n_rows, splits), config.ROWS) * config.ROWS
    return splits, _launch_of(scale_backward_kernel, blocks * splits, (n_rows, n, rows), config)


def _launch_of(kernel, grid: int, scalars: tuple, config: ScaleConfig) -> Launch:
    constants = {"INTERPRETED": INTERPRETED, "ROWS": config.ROWS, "COLUMNS": config.COLUMNS}
    return Launch(kernel, grid, scalars, constants, config.num_warps, config.num_stages)
