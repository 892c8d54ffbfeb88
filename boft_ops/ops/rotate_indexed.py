"""Rows times the rotation that each of them names: many adapters in one batch.

``rotate_indexed`` is ``rotate`` with a set of stage matrices for each adapter and the number of an
adapter for each row. It is one launch for each stage, whatever the number of adapters, and so is
its gradient, ``segment_stage_grads`` of the rows sorted by adapter.
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
    triton_supports_stage,
)
from .segment_stage_grads import segment_stage_grads, splits_of, total
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
    fake=fake_rotate,
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
    """y = x R (or x R^T) with the R of each row. Saves x, the index and the stage matrices.

    ``offsets`` are the ends of the adapters' segments if the rows are sorted by adapter, else None.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, index, offsets, transpose: bool, plan: tuple[Stage, ...], *matrices):
        return _through_stages(x, index, transpose, plan, matrices)[-1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, index, offsets, ctx.transpose, ctx.plan, *matrices = inputs
        x = x if any(ctx.needs_input_grad[5:]) else None
        ctx.save_for_backward(x, index, offsets, *matrices)

    @staticmethod
    def backward(ctx, grad):
        x, index, offsets, *matrices = ctx.saved_tensors
        plan, transpose, grad = ctx.plan, ctx.transpose, grad.contiguous()
        order, sorting = order_of(plan, transpose), None
        grads: list[torch.Tensor | None] = [None] * len(plan)
        if x is not None:
            if offsets is None:
                sorting, offsets = _sort(index, len(matrices[0]))
                x, grad, index = x[sorting], grad[sorting], index[sorting]
            # the input of each stage, once more
            inputs = _through_stages(x, index, transpose, plan, matrices)
        for position in reversed(range(len(plan))):
            i = order[position]
            if x is not None:
                grads[i] = _stage_gradients(
                    inputs[position], grad, offsets, plan[i], matrices[i], transpose
                )
            if ctx.needs_input_grad[0] or position:
                layout = plan[i].chunk, plan[i].stride, not transpose
                grad = rotate_indexed_rows(grad, matrices[i], index, *layout)
        if not ctx.needs_input_grad[0]:
            grad = None
        elif sorting is not None:
            grad = grad[sorting.argsort()]
        return grad, None, None, None, None, *grads


def _through_stages(x, index, transpose, plan, matrices) -> list[torch.Tensor]:
    """x, and what it is after each stage."""
    states = [x]
    for i in order_of(plan, transpose):
        layout = plan[i].chunk, plan[i].stride, transpose
        states.append(rotate_indexed_rows(states[-1], matrices[i], index, *layout))
    return states


def _stage_gradients(x, grad, offsets, stage: Stage, matrix, transpose) -> torch.Tensor:
    """The gradients of all adapters' stages, in one pass over rows that are sorted by adapter."""
    pair = (grad, x) if transpose else (x, grad)
    layout = stage.size, stage.chunk, stage.stride, splits_of(stage, x, len(matrix))
    return total(segment_stage_grads(*pair, offsets, *layout)).to(matrix.dtype)


def _sort(index: torch.Tensor, n_adapters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows in the order of their adapters, those without one last, and the adapters' ends.

    The sizes of the results do not depend on the index: there is no host sync, and compiled graphs
    are made once.
    """
    outside = (index < 0) | (index >= n_adapters)
    numbers, order = torch.where(outside, n_adapters, index).sort(stable=True)
    adapters = torch.arange(n_adapters, device=index.device, dtype=numbers.dtype)
    return order, torch.searchsorted(numbers, adapters, right=True, out_int32=True)


def butterfly_matmul_indexed(
    x: torch.Tensor, blocks: torch.Tensor, index: torch.Tensor, *, transpose: bool = False
) -> torch.Tensor:
    """Each row of x times the butterfly matrix, or its transpose, that its index names.

    As ``butterfly_matmul(x[i], blocks[index[i]])`` for each row i, in one launch for each stage of
    the plan. For serving many adapters in one batch; rows of one adapter are best neighbours. The
    gradient of ``blocks`` sorts the rows by adapter; if they are sorted already, as those of
    experts are, ``butterfly_matmul_segments`` spares it.

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
    x, stages, matrices = _prepared(x, blocks)
    index = index_of_rows(index, x, len(blocks))
    return rotate_indexed(x, matrices, stages, index, transpose)


def butterfly_matmul_segments(
    x: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor, *, transpose: bool = False
) -> torch.Tensor:
    """Each segment of rows of x times a butterfly matrix of its own, or its transpose.

    As ``butterfly_matmul(x[offsets[e - 1] : offsets[e]], blocks[e])`` for each segment e, in one
    launch for each stage of the plan; the gradient, too, takes one pass over x, however many
    segments there are. For the rows of experts, which are sorted by expert.

    Args:
        x: (N, d), float64, float32, bfloat16 or float16.
        blocks: (E, m, K, b, b) with K * b = d: the blocks of E butterflies, as for
            ``butterfly_matmul``.
        offsets: integers (E,), the ascending ends of the segments, the first of which begins at
            row 0, as ``offs`` of ``torch.nn.functional.grouped_mm``. A segment may be empty. Rows
            from the last end on are left as they are. On a CPU, not in a compiled graph, other
            numbers raise; elsewhere a look at them would wait for the device.
        transpose: multiply by the transposes instead.

    Returns:
        (N, d) in the dtype of x.

    Raises:
        TypeError: an argument is not a tensor of its kind.
        ValueError: shapes do not fit, or offsets descend or lie outside of [0, N].
    """
    x, stages, matrices = _prepared(x, blocks)
    if x.dim() != 2:
        raise ValueError(f"x: expected rows (N, d), got shape {tuple(x.shape)}")
    _check_integers("offsets", offsets, x)
    if offsets.shape != blocks.shape[:1]:
        raise ValueError(
            f"offsets: expected an end for each of {len(blocks)} segments, got shape "
            f"{tuple(offsets.shape)}"
        )
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = [0, *offsets.tolist(), len(x)]
        if ends != sorted(ends):
            raise ValueError(f"offsets: expected ascending ends up to {len(x)}, got {ends[1:-1]}")
    offsets = offsets.to(torch.int32)
    rows = torch.arange(len(x), device=x.device, dtype=torch.int32)
    index = torch.searchsorted(offsets, rows, right=True, out_int32=True)
    index = torch.where(index < len(blocks), index, IDENTITY)
    return rotate_indexed(x, matrices, stages, index, transpose, offsets)


def _prepared(
    x: torch.Tensor, blocks: torch.Tensor
) -> tuple[torch.Tensor, tuple[Stage, ...], tuple[torch.Tensor, ...]]:
    """x as autocast has it, the stages of the plan and their matrices; checks x and blocks."""
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
    return x, stages, compose_all(blocks, stages, x.dtype)


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
    _check_integers("index", index, x)
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


def _check_integers(name: str, numbers: torch.Tensor, x: torch.Tensor) -> None:
    """Raise TypeError unless ``numbers`` are integers, and ValueError if not on the device of x."""
    is_tensor = isinstance(numbers, torch.Tensor)
    if not is_tensor or numbers.is_floating_point() or numbers.is_complex():
        kind = getattr(numbers, "dtype", type(numbers).__name__)
        raise TypeError(f"{name}: expected a tensor of integers, got {kind}")
    if numbers.dtype == torch.bool:
        raise TypeError(f"{name}: expected a tensor of integers, got torch.bool")
    checks.same_device(name, numbers, "x", x)


def rotate_indexed(
    x: torch.Tensor,
    matrices: tuple[torch.Tensor, ...],
    plan: tuple[Stage, ...],
    index: torch.Tensor,
    transpose: bool,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., d) through the composed stages (A, d/size, size, size) that ``index`` (N,) names.

    ``offsets`` (A,) are the ends of the adapters' segments if ``index`` is ascending, -1 last.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    # as in ``rotate``
    function = RotateIndexed.apply if torch.is_grad_enabled() else RotateIndexed.forward
    return function(rows, index, offsets, transpose, plan, *matrices).reshape(x.shape)
