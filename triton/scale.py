"""Gradients of y = scale * (x - center) + bias in Triton, in one pass over the rows."""

import torch
import triton
import triton.language as tl

from .config import tuned
from .config_scale import PROGRAMS, ScaleConfig, config_for
from .groups import round_to
from .rotate import INTERPRETED


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def scale_backward_kernel(
    grad_ptr, x_ptr, scale_ptr, center_ptr, x_grad_ptr, sums_ptr, n_rows, n, rows_per_program,
    INTERPRETED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of x_grad, and their sums over a split of the rows: grad (x - center), grad."""
    sum_dtype: tl.constexpr = sums_ptr.dtype.element_ty
    blocks = (n + COLUMNS - 1) // COLUMNS
    split = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    scale = tl.load(scale_ptr + column, mask=inside, other=0.0).to(sum_dtype)
    center = tl.load(center_ptr + column, mask=inside, other=0.0).to(sum_dtype)
    scale_sum = tl.zeros([COLUMNS], sum_dtype)
    bias_sum = tl.zeros([COLUMNS], sum_dtype)
    first = split * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    row = tl.arange(0, ROWS)
    offset = row[:, None] * n + column[None, :]
    for start in range(first, last, ROWS):
        mask = (row < last - start)[:, None] & inside[None, :]
        at = start * n + offset
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(sum_dtype)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(sum_dtype)
        x_grad = round_to(grad * scale[None, :], x_grad_ptr.dtype.element_ty, INTERPRETED)
        tl.store(x_grad_ptr + at, x_grad, mask=mask)
        scale_sum += tl.sum(grad * (x - center[None, :]), axis=0)
        bias_sum += tl.sum(grad, axis=0)
    tl.store(sums_ptr + split * 2 * n + column, scale_sum, mask=inside)
    tl.store(sums_ptr + split * 2 * n + n + column, bias_sum, mask=inside)


def scale_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, center: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (N, n), scale and bias (n,) from grad (N, n); checked by the caller."""
    grad, x, scale, center = (t.contiguous() for t in (grad, x, scale, center))
    n_rows, n = x.shape
    x_grad = torch.empty_like(x)
    if x.numel() == 0:
        return x_grad, torch.zeros_like(scale), torch.zeros_like(center)
    config: ScaleConfig = tuned(config_for(), "scale_backward", x, (), x.shape)
    blocks = triton.cdiv(n, config.COLUMNS)
    splits = max(1, min(triton.cdiv(PROGRAMS, blocks), triton.cdiv(n_rows, config.ROWS)))
    rows = triton.cdiv(triton.cdiv(n_rows, splits), config.ROWS) * config.ROWS
    sums = x.new_empty(splits, 2, n, dtype=torch.promote_types(x.dtype, torch.float32))
    arguments = grad, x, scale, center, x_grad, sums, n_rows, n, rows
    constants = {"ROWS": config.ROWS, "COLUMNS": config.COLUMNS, "INTERPRETED": INTERPRETED}
    with torch.cuda.device_of(x):  # does nothing for CPU tensors, in the interpreter
        scale_backward_kernel[(blocks * splits,)](
            *arguments, **constants, num_warps=config.num_warps, num_stages=config.num_stages
        )
    scale_grad, bias_grad = sums.sum(0)
    return x_grad, scale_grad.to(scale.dtype), bias_grad.to(center.dtype)
