"""Rows times the rotation that each of them names: many adapters in one batch.

``rotate_indexed`` is ``rotate`` with a set of stage matrices for each adapter and the number of an
adapter for each row. It is one launch for each stage, whatever the number of adapters.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch

from .._runtime import autocast, checks
from .._runtime.backend import Kernel, Op
from .._runtime.workload import Workload
from .compose import compose
from .planner import plan_for
from .rotate import (
    ROWS,
    class_of_rows,
    cpu_supports_stage,
    cuda_supports_stage,
    fake_rotate,
    flops_of_rotate,
    order_of,
    rotate_reference,
    rotate_stage_grad,
    triton_supports_stage,
)
from .stages import Stage, plan

IDENTITY = -1  # the index of rows that are left as they are
SAMPLE_ADAPTERS = 8


def _rotate_indexed(
    x: torch.Tensor,
    stages: torch.Tensor,
    index: torch.Tensor,
    chunk: int,
    stride: int,
    transpose: bool,
) -> torch.Tensor:
    y = torch.where((index == IDENTITY)[:, None], x, float("nan"))
    for adapter, stage in enumerate(stages):
        rotated = rotate_reference(x, stage, chunk, stride, transpose)
        y = torch.where((index == adapter)[:, None], rotated, y)
    return y


def _fake_rotate_indexed(
    x: torch.Tensor,
    stages: torch.Tensor,
    index: torch.Tensor,
    chunk: int,
    stride: int,
    transpose: bool,
) -> torch.Tensor:
    return fake_rotate(x, stages, chunk, stride, transpose)


def _samples(w: Workload) -> Iterator[tuple]:
    """Rows of SAMPLE_ADAPTERS adapters, those of one adapter side by side."""
    index = torch.arange(w.rows, device=w.device) * SAMPLE_ADAPTERS // max(1, w.rows)
    for stage in plan(w.n_factors, w.block_size, w.device.type):
        matrices = w.matrices(SAMPLE_ADAPTERS * w.d // stage.size, stage.size)
        matrices = matrices.unflatten(0, (SAMPLE_ADAPTERS, -1))
        yield w.x(), matrices, index.to(torch.int32), stage.chunk, stage.stride, False


def _class_of(x, stages, index, chunk, stride, transpose) -> tuple[tuple, tuple]:
    return class_of_rows(stages.shape[-1], chunk, stride, x)


rotate_indexed_rows = Op(
    # x (N, d), stages (A, d/size, size, size), index (N,) int32 in [-1, A); other indices give NaN
    "rotate_indexed(Tensor x, Tensor stages, Tensor index, int chunk, int stride, bool transpose)"
    " -> Tensor",
    reference=_rotate_indexed,
    fake=_fake_rotate_indexed,
    samples=_samples,
    kernels={
        "cpu": Kernel(cpu_supports_stage),
        "cuda": Kernel(cuda_supports_stage),
        "triton": Kernel(
            triton_supports_stage, "rotate_indexed:rotate_indexed", "rotate_indexed:TILES"
        ),
    },
    shape_class=ROWS._replace(of=_class_of),
    flops=flops_of_rotate,
)


class RotateIndexed(torch.autograd.Function):
    """y = x R (or x R^T) with the R of each row. Saves x, the index and the stage matrices."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, index, transpose: bool, plan: tuple[Stage, ...], *matrices):
        return _through_stages(x, index, transpose, plan, matrices)[-1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, index, ctx.transpose, ctx.plan, *matrices = inputs
        ctx.save_for_backward(x if any(ctx.needs_input_grad[4:]) else None, index, *matrices)

    @staticmethod
    def backward(ctx, grad):
        x, index, *matrices = ctx.saved_tensors
        plan, transpose, grad = ctx.plan, ctx.transpose, grad.contiguous()
        order = order_of(plan, transpose)
        grads: list[torch.Tensor | None] = [None] * len(plan)
        if x is not None:  # the input of each stage, once more
            inputs = _through_stages(x, index, transpose, plan, matrices)
        for position in reversed(range(len(plan))):
            i = order[position]
            if x is not None:
                grads[i] = _stage_gradient(
                    inputs[position], grad, index, plan[i], matrices[i], transpose
                )
            if ctx.needs_input_grad[0] or position:
                layout = plan[i].chunk, plan[i].stride, not transpose
                grad = rotate_indexed_rows(grad, matrices[i], index, *layout)
        return grad if ctx.needs_input_grad[0] else None, None, None, None, *grads


def _through_stages(x, index, transpose, plan, matrices) -> list[torch.Tensor]:
    """x, and what it is after each stage."""
    states = [x]
    for i in order_of(plan, transpose):
        layout = plan[i].chunk, plan[i].stride, transpose
        states.append(rotate_indexed_rows(states[-1], matrices[i], index, *layout))
    return states


def _stage_gradient(x, grad, index, stage: Stage, matrix, transpose) -> torch.Tensor:
    """The gradient of each adapter's stage: one pass over all rows for each adapter.

    Serving needs none of it, and training has few adapters; nothing depends on how many rows an
    adapter has, so that there is no host sync and compiled graphs are made once.
    """
    parts, stage_grads = stage.splits(x), []
    for adapter in range(len(matrix)):
        mine = torch.where((index == adapter)[:, None], x, 0)
        pair = (grad, mine) if transpose else (mine, grad)
        partial = rotate_stage_grad(*pair, stage.size, stage.chunk, stage.stride, parts)
        stage_grads.append(partial.sum(0))
    return torch.stack(stage_grads).to(matrix.dtype)


def butterfly_matmul_indexed(
    x: torch.Tensor, blocks: torch.Tensor, index: torch.Tensor, *, transpose: bool = False
) -> torch.Tensor:
    """Each row of x times the butterfly matrix, or its transpose, that its index names.

    As ``butterfly_matmul(x[i], blocks[index[i]])`` for each row i, in one launch for each stage of
    the plan. For serving many adapters in one batch; rows of one adapter are best neighbours. The
    gradient of ``blocks`` takes a pass over x for each adapter.

    Args:
        x: (..., d), float64, float32, bfloat16 or float16.
        blocks: (A, m, K, b, b) with K * b = d: the blocks of A adapters, as for
            ``butterfly_matmul``.
        index: integers that broadcast to the shape of x without its last dimension; -1 leaves a
            row as it is. On a CPU, not in a compiled graph, others than -1..A-1 raise; elsewhere,
            where a look at them would wait for the device, their rows are NaN.
        transpose: multiply by the transposes instead.

    Returns:
        (..., d) in the dtype of x.

    Raises:
        TypeError: an argument is not a tensor of its kind.
        ValueError: shapes do not fit, or an index is out of range.
    """
    checks.tensor("x", x, min_dim=1)
    checks.tensor("blocks", blocks)
    if blocks.dim() != 5 or blocks.shape[-1] != blocks.shape[-2] or 0 in blocks.shape:
        raise ValueError(
            "blocks: expected shape (adapters, n_factors, d/block_size, block_size, block_size), "
            f"got {tuple(blocks.shape)}"
        )
    _, m, n_blocks, b = (operator.index(size) for size in blocks.shape[:4])
    checks.butterfly_shape(n_blocks * b, b, m)
    if x.shape[-1] != n_blocks * b:
        raise ValueError(
            f"x: expected a last dimension of {n_blocks} blocks * {b} = {n_blocks * b}, "
            f"got shape {tuple(x.shape)}"
        )
    checks.same_device("blocks", blocks, "x", x)
    x = autocast.cast(x)
    stages = plan_for(x, m, b)
    index = index_of_rows(index, x, len(blocks))
    matrices = compose_all(blocks, stages, x.dtype)
    return rotate_indexed(x, matrices, stages, index, transpose)


def compose_all(
    blocks: torch.Tensor, stages: tuple[Stage, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Blocks (A, m, K, b, b) -> the matrices of each stage, (A, d/size, size, size).

    A butterfly mixes no further than its span, which divides d: those of all adapters, one after
    the other, are one of A * d features.
    """
    joined = blocks.transpose(0, 1).flatten(1, 2)
    matrices = compose(joined, stages, dtype)
    return tuple(matrix.unflatten(0, (len(blocks), -1)) for matrix in matrices)


def index_of_rows(index: torch.Tensor, x: torch.Tensor, n_adapters: int) -> torch.Tensor:
    """``index`` as one int32 for each row of x (..., d); what it must be, see above."""
    if not isinstance(index, torch.Tensor) or index.is_floating_point() or index.is_complex():
        kind = getattr(index, "dtype", type(index).__name__)
        raise TypeError(f"index: expected a tensor of integers, got {kind}")
    if index.dtype == torch.bool:
        raise TypeError("index: expected a tensor of integers, got torch.bool")
    checks.same_device("index", index, "x", x)
    try:
        rows = index.expand(x.shape[:-1])
    except RuntimeError as error:
        raise ValueError(
            f"index: expected a shape that broadcasts to {tuple(x.shape[:-1])}, got "
            f"{tuple(index.shape)}"
        ) from error
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        least, most = (int(value) for value in index.aminmax())
        if least < IDENTITY or most >= n_adapters:
            raise ValueError(
                f"index: expected numbers in [-1, {n_adapters - 1}], got {least} to {most}"
            )
    elif torch.iinfo(index.dtype).max > torch.iinfo(torch.int32).max:
        # a number beyond int32 must not come back as another adapter's
        rows = rows.to(torch.int64).clamp(IDENTITY - 1, n_adapters)
    return rows.reshape(-1).to(torch.int32)


def rotate_indexed(
    x: torch.Tensor,
    matrices: tuple[torch.Tensor, ...],
    plan: tuple[Stage, ...],
    index: torch.Tensor,
    transpose: bool,
) -> torch.Tensor:
    """x (..., d) through the composed stages (A, d/size, size, size) that ``index`` (N,) names."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    # as in ``rotate``
    function = RotateIndexed.apply if torch.is_grad_enabled() else RotateIndexed.forward
    return function(rows, index, transpose, plan, *matrices).reshape(x.shape)
