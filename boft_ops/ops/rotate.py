"""Operators that multiply the rows of x by the stages of a butterfly.

``rotate`` multiplies each row by one block-diagonal stage. ``rotate_backward`` gives both of its
gradients in one pass over the rows, ``rotate_stage_grad`` that of the stage alone. A row of d
features has d / (size * stride) runs of size / chunk * stride chunks. A group is the chunks of one
run that lie ``stride`` apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .._runtime.backend import Kernel, Op
from .._runtime.dtypes import COMPUTE
from .._runtime.limits import MAX_STAGE
from .._runtime.tuned import ShapeClass
from .._runtime.workload import Workload
from .stages import Stage, plan


def _groups(x: torch.Tensor, size: int, chunk: int, stride: int) -> torch.Tensor:
    """(N, d) -> (d/size, N, size); a view if the chunks of a group are neighbors."""
    n, d = x.shape
    if stride == 1:
        return x.reshape(n, d // size, size).transpose(0, 1)
    runs = x.reshape(n, d // (size * stride), size // chunk, stride, chunk)
    return runs.permute(1, 3, 0, 2, 4).reshape(d // size, n, size)


def _ungroup(groups: torch.Tensor, chunk: int, stride: int) -> torch.Tensor:
    """Inverse of ``_groups``."""
    n_groups, n, size = groups.shape
    if stride == 1:
        return groups.transpose(0, 1).reshape(n, n_groups * size)
    runs = groups.reshape(n_groups // stride, stride, n, size // chunk, chunk)
    return runs.permute(2, 0, 3, 1, 4).reshape(n, n_groups * size)


def rotate_reference(
    x: torch.Tensor,
    stage: torch.Tensor,
    chunk: int,
    stride: int,
    transpose: bool,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    size = stage.shape[-1]
    groups = _groups(x, size, chunk, stride)
    if torch.finfo(x.dtype).bits < 32:
        # y = x + x (R - I): rounding R itself to 8 or 11 bits would swamp a small rotation
        stage = stage - torch.eye(size, dtype=stage.dtype, device=stage.device)
    stage = (stage.mT if transpose else stage).to(x.dtype)
    if torch.finfo(x.dtype).bits < 32:
        y = _ungroup(torch.baddbmm(groups, groups, stage), chunk, stride)
    else:
        y = _ungroup(torch.bmm(groups, stage), chunk, stride)
    return y if factor is None else (y * factor[:, None]).to(x.dtype)


def rotate_stage_grad_reference(
    x: torch.Tensor, grad: torch.Tensor, size: int, chunk: int, stride: int, splits: int
) -> torch.Tensor:
    left = _groups(x, size, chunk, stride)
    right = _groups(grad, size, chunk, stride)
    product = torch.bmm(left.mT, right)[None]
    product = product.to(COMPUTE[x.dtype])
    # the whole sum in the first part: kernels divide it, one part for each share of the rows
    return torch.cat([product, product.new_zeros(splits - 1, *product.shape[1:])])


def rotate_backward_reference(
    grad: torch.Tensor,
    x: torch.Tensor,
    stage: torch.Tensor,
    chunk: int,
    stride: int,
    transpose: bool,
    splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    pair = (grad, x) if transpose else (x, grad)
    stage_grad = rotate_stage_grad_reference(*pair, stage.shape[-1], chunk, stride, splits)
    return rotate_reference(grad, stage, chunk, stride, not transpose), stage_grad


def fake_rotate(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_stage_grad(
    x: torch.Tensor, grad: torch.Tensor, size: int, chunk: int, stride: int, splits: int
) -> torch.Tensor:
    return x.new_empty(splits, x.shape[1] // size, size, size, dtype=COMPUTE[x.dtype])


def _fake_rotate_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    stage: torch.Tensor,
    chunk: int,
    stride: int,
    transpose: bool,
    splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    return x_grad, _fake_stage_grad(x, grad, stage.shape[-1], chunk, stride, splits)


MAX_CPU_SIZE = 128  # features of a group, up to which the CPU kernels beat a BLAS


def _cpu_supports_group(x: torch.Tensor, size: int) -> bool:
    return x.dtype != torch.float16 and size <= MAX_CPU_SIZE


def cuda_supports_stage(x: torch.Tensor, stage: torch.Tensor, *_: object) -> bool:
    """True if the kernels in CUDA C++ multiply rows by a stage (..., size, size) of this dtype."""
    return stage.dtype == COMPUTE[x.dtype] and stage.shape[-1] <= MAX_STAGE


def cpu_supports_stage(x: torch.Tensor, stage: torch.Tensor, *_: object) -> bool:
    """True if the CPU kernels multiply rows by a stage (..., size, size) of this dtype."""
    return stage.dtype == COMPUTE[x.dtype] and _cpu_supports_group(x, stage.shape[-1])


def triton_supports_stage(x: torch.Tensor, stage: torch.Tensor, *_: object) -> bool:
    """True if the Triton kernels multiply rows by a stage (..., size, size)."""
    return stage.shape[-1] <= MAX_STAGE


def _sample_stages(w: Workload) -> Iterator[tuple[Stage, torch.Tensor]]:
    for stage in plan(w.n_factors, w.block_size, w.device.type):
        yield stage, w.matrices(w.d // stage.size, stage.size)


def _samples(w: Workload) -> Iterator[tuple]:
    for stage, matrix in _sample_stages(w):
        yield w.x(), matrix, stage.chunk, stage.stride, False
    factor = 1 + w.tensor(w.rows, std=0.1, dtype=w.compute_dtype)
    yield w.x(), matrix, stage.chunk, stage.stride, True, factor


def _stage_grad_samples(w: Workload) -> Iterator[tuple]:
    for stage, _ in _sample_stages(w):
        x, grad = w.x(), w.grad_x()
        yield x, grad, stage.size, stage.chunk, stage.stride, stage.splits(x)


def _backward_samples(w: Workload) -> Iterator[tuple]:
    for stage, matrix in _sample_stages(w):
        x, grad = w.x(), w.grad_x()
        yield grad, x, matrix, stage.chunk, stage.stride, False, stage.splits(x)


def class_of_rows(size: int, chunk: int, stride: int, x: torch.Tensor) -> tuple[tuple, tuple]:
    """The shape class (``ROWS``) of a pass over rows x with groups of ``size`` features.

    With stride 1 a group is contiguous, so that the width of its chunks makes no difference.
    """
    return (size, size if stride == 1 else chunk, stride), tuple(x.shape)


def _class_of(x, stage, chunk, stride, *_) -> tuple[tuple, tuple]:
    return class_of_rows(stage.shape[-1], chunk, stride, x)


def _stage_grad_class_of(x, grad, size, chunk, stride, splits) -> tuple[tuple, tuple]:
    return class_of_rows(size, chunk, stride, x)


def _backward_class_of(grad, x, stage, chunk, stride, transpose, splits) -> tuple[tuple, tuple]:
    return class_of_rows(stage.shape[-1], chunk, stride, x)


def _cpu_supports_stage_grad(x, grad, size, chunk, stride, splits) -> bool:
    return _cpu_supports_group(x, size) and splits == 1


def _gpu_supports_stage_grad(x, grad, size, *_: int) -> bool:
    return size <= MAX_STAGE


def _cpu_supports_backward(grad, x, stage, chunk, stride, transpose, splits) -> bool:
    return cpu_supports_stage(x, stage) and splits == 1


def _cuda_supports_backward(grad, x, stage, *_: int) -> bool:
    return cuda_supports_stage(x, stage)


def _triton_supports_backward(grad, x, stage, *_: int) -> bool:
    return triton_supports_stage(x, stage)


# Groups of 32 features that lie apart, in half precision: on an H200 they take less time than by
# Triton's kernels, both ways (docs/cuda.md).
def _cuda_prefers(
    x: torch.Tensor, stage: torch.Tensor, chunk: int, stride: int, *_: object
) -> bool:
    return stride > 1 and stage.shape[-1] == 32 and x.dtype.itemsize == 2


def _cuda_prefers_backward(grad, x, stage, chunk, stride, *_: int) -> bool:
    return _cuda_prefers(x, stage, chunk, stride)


def flops_of_rotate(x: torch.Tensor, stage: torch.Tensor, *_: object) -> int:
    """The flops of rows times a stage (..., size, size)."""
    return 2 * x.numel() * stage.shape[-1]


ROWS = ShapeClass(("size", "chunk", "stride"), ("rows", "features"), _class_of)
# y_i = factor_i (x_i R), or x_i R^T if `transpose`, of the groups R of one stage.
#   x (rows, d); stage (d/size, size, size); factor (rows,) in the compute dtype of x, None for ones
#     It is multiplied in before y is rounded: so a weight meets rotation and scale in one pass.
rotate_rows = Op(
    "rotate(Tensor x, Tensor stage, int chunk, int stride, bool transpose, Tensor? factor=None)"
    " -> Tensor",
    reference=rotate_reference,
    fake=fake_rotate,
    samples=_samples,
    kernels={
        "cpu": Kernel(cpu_supports_stage),
        "cuda": Kernel(cuda_supports_stage, preferred=_cuda_prefers),
        "triton": Kernel(triton_supports_stage, "rotate:rotate", "rotate:TILES"),
    },
    shape_class=ROWS,
    flops=flops_of_rotate,
)
# Gradients of a stage come as partial sums (splits, d/size, size, size), in at least float32.
rotate_stage_grad = Op(
    "rotate_stage_grad(Tensor x, Tensor grad, int size, int chunk, int stride, int splits)"
    " -> Tensor",
    reference=rotate_stage_grad_reference,
    fake=_fake_stage_grad,
    samples=_stage_grad_samples,
    kernels={
        "cpu": Kernel(_cpu_supports_stage_grad),
        "cuda": Kernel(_gpu_supports_stage_grad),
        "triton": Kernel(
            _gpu_supports_stage_grad,
            "rotate_backward:rotate_stage_grad",
            "rotate_backward:STAGE_GRAD_TILES",
        ),
    },
    shape_class=ROWS._replace(of=_stage_grad_class_of),
    comparable=lambda partials: partials.sum(0),
    flops=lambda x, grad, size, *_: 2 * x.numel() * size,
)
rotate_backward = Op(
    "rotate_backward(Tensor grad, Tensor x, Tensor stage, int chunk, int stride, bool transpose,"
    " int splits) -> (Tensor, Tensor)",
    reference=rotate_backward_reference,
    fake=_fake_rotate_backward,
    samples=_backward_samples,
    kernels={
        "cpu": Kernel(_cpu_supports_backward),
        "cuda": Kernel(_cuda_supports_backward, preferred=_cuda_prefers_backward),
        "triton": Kernel(
            _triton_supports_backward,
            "rotate_backward:rotate_backward",
            "rotate_backward:BACKWARD_TILES",
        ),
    },
    shape_class=ROWS._replace(of=_backward_class_of),
    comparable=lambda result: (result[0], result[1].sum(0)),
    flops=lambda grad, *args: 2 * flops_of_rotate(*args),
)


def apply_stages(
    x: torch.Tensor,
    matrices: Sequence[torch.Tensor],
    plan: tuple[Stage, ...],
    transpose: bool,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply rows x (N, d) by all the stages, and by a factor (N,) each, outside of autograd."""
    *others, last = order_of(plan, transpose)
    for i in others:
        x = rotate_rows(x, matrices[i], plan[i].chunk, plan[i].stride, transpose)
    layout = plan[last].chunk, plan[last].stride, transpose
    if factor is None:  # the shorter call takes the host less time
        return rotate_rows(x, matrices[last], *layout)
    return rotate_rows(x, matrices[last], *layout, factor)


def apply_stages_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    matrices: Sequence[torch.Tensor],
    plan: tuple[Stage, ...],
    transpose: bool,
    need_x: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """The gradient of x and, unless x is None, the partial sums of each stage's gradient.

    The input of each stage is computed again from x: nothing else of its size needs to be kept.
    """
    order = order_of(plan, transpose)
    partials: list[torch.Tensor | None] = [None] * len(plan)
    if x is None:
        return apply_stages(grad, matrices, plan, not transpose) if need_x else None, partials
    inputs = [x]
    for i in order[:-1]:
        stage = (matrices[i], plan[i].chunk, plan[i].stride, transpose)
        inputs.append(rotate_rows(inputs[-1], *stage))
    for i in reversed(order):
        size, chunk, stride = plan[i].size, plan[i].chunk, plan[i].stride
        parts = plan[i].splits(grad)
        if need_x or i != order[0]:
            grad, partials[i] = rotate_backward(
                grad, inputs.pop(), matrices[i], chunk, stride, transpose, parts
            )
        else:
            pair = (grad, inputs.pop()) if transpose else (inputs.pop(), grad)
            partials[i] = rotate_stage_grad(*pair, size, chunk, stride, parts)
    return grad if need_x else None, partials


def gradients_of_orthogonal_stages(
    x: torch.Tensor,
    x_grad: torch.Tensor,
    matrices: Sequence[torch.Tensor],
    plan: tuple[Stage, ...],
) -> list[torch.Tensor]:
    """The gradient (1, d/size, size, size) of each stage, from x (N, d) and its own gradient.

    With a stage M, y = x M and M orthogonal: dL/dM = x^T (dL/dy) = (x^T dL/dx) M. The next stage
    has the rows x M, whose gradient is (dL/dx) M.
    """
    gradients = [x] * len(plan)
    *others, last = order_of(plan, False)
    for i in others:
        layout = plan[i].chunk, plan[i].stride
        # as if x_grad had met M^T before: its pass and the Gram matrix are one kernel's
        turned, gram = rotate_backward(x_grad, x, matrices[i], *layout, True, plan[i].splits(x))
        gradients[i] = _gram_times(gram.sum(0).mT, matrices[i])
        x, x_grad = rotate_rows(x, matrices[i], *layout, False), turned
    layout = plan[last].size, plan[last].chunk, plan[last].stride, plan[last].splits(x)
    gram = rotate_stage_grad(x, x_grad, *layout).sum(0)
    gradients[last] = _gram_times(gram, matrices[last])
    return gradients


def _gram_times(gram: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return (gram.to(matrix.dtype) @ matrix)[None]


class Rotate(torch.autograd.Function):
    """Computes y = x R, or x R^T, through the stages. Saves x and the stage matrices alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, transpose: bool, plan: tuple[Stage, ...], *matrices):
        return apply_stages(x, matrices, plan, transpose)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.transpose, ctx.plan, *matrices = inputs
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, *matrices)

    @staticmethod
    def backward(ctx, grad):
        x, *matrices = ctx.saved_tensors
        x_grad, partials = apply_stages_backward(
            grad.contiguous(), x, matrices, ctx.plan, ctx.transpose, ctx.needs_input_grad[0]
        )
        grads = [
            None if p is None else p.sum(0).to(matrix.dtype)
            for p, matrix in zip(partials, matrices, strict=True)
        ]
        return x_grad, None, None, *grads


def order_of(plan: tuple[Stage, ...], transpose: bool) -> list[int]:
    """The indices of the stages as x meets them: the largest stride first for R, last for R^T."""
    order = list(range(len(plan)))
    return order if transpose else order[::-1]


def rotate(
    x: torch.Tensor, matrices: tuple[torch.Tensor, ...], plan: tuple[Stage, ...], transpose: bool
) -> torch.Tensor:
    """x (..., d) times the composed stages (or the transposed product), in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    # Without grad call forward directly: with a varying number of arguments, Dynamo would take the
    # first one for the context.
    function = Rotate.apply if torch.is_grad_enabled() else Rotate.forward
    return function(rows, transpose, plan, *matrices).reshape(x.shape)
