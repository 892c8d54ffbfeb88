"""Other ways to a rotated layer than rotating x, then a product with W.

``rotate_linear`` makes the launches of a layer in one call each way: Python takes longer to make
them than a GPU takes to run them, at any but the largest sizes. In compiled graphs they stay apart.
``weight_side_backward`` is for a layer that rotated W in the place of x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .._runtime import autocast, backend, tuned
from .._runtime.backend import Kernel, Op
from .._runtime.limits import MAX_STAGE
from .._runtime.tuned import ShapeClass
from .rotate import (
    apply_stages,
    gram,
    rotate_backward,
    rotate_backward_reference,
    rotate_reference,
    rotate_rows,
)
from .scale import scale_backward, scale_backward_reference, scale_forward, scale_reference
from .stages import Stage

MAX_SIZE = 64  # of a stage; for larger ones Triton's rotate is the faster


def composed(
    rotate: Callable, rotate_backward: Callable, scale_rows: Callable, scale_backward: Callable
) -> tuple[Callable, Callable]:
    """The op and its backward, of these operators and torch's products between them."""

    def rotate_linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        stage: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        save: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        z = F.linear(rotate(x, stage, stage.shape[-1], 1, False), weight, bias)
        y = z if scale is None else scale_rows(z, scale, bias, bias)
        return y, z if save and scale is not None else z.new_empty(0, z.shape[1])

    def rotate_linear_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        stage: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        z: torch.Tensor | None,
        splits: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        if z is not None:
            grad, scale_grad, bias_grad = scale_backward(grad, z, scale, bias)
        else:
            scale_grad, bias_grad = stage.new_empty(0), stage.new_empty(0)
            if scale is not None:
                grad = scale_rows(grad, scale, None, None)
        layout = stage.shape[-1], 1, False
        x_grad, partials = rotate_backward(grad @ weight, x, stage, *layout, splits)
        return x_grad, partials, scale_grad, bias_grad

    return rotate_linear, rotate_linear_backward


_rotate_linear, _rotate_linear_backward = composed(
    rotate_reference, rotate_backward_reference, scale_reference, scale_backward_reference
)


def _of_triton() -> tuple[Callable, Callable]:
    """The same with launches of Triton's kernels, one after the other, in their measured tiles."""

    def launch_of(op: Op) -> Callable:
        return op.launch

    return composed(
        *(launch_of(op) for op in (rotate_rows, rotate_backward, scale_forward, scale_backward))
    )


def _fake_rotate_linear(x, weight, stage, scale, bias, save):
    rows, n = x.shape[0], weight.shape[0]
    return x.new_empty(rows, n), x.new_empty(rows if save and scale is not None else 0, n)


def _fake_rotate_linear_backward(grad, x, weight, stage, scale, bias, z, splits):
    n = 0 if z is None else weight.shape[0]
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    wide = torch.promote_types(x.dtype, torch.float32)
    partials = stage.new_empty(splits, *stage.shape, dtype=wide)
    like = stage if z is None else scale
    return x_grad, partials, like.new_empty(n), like.new_empty(n)


def _cuda_takes(x: torch.Tensor, weight: torch.Tensor, stage: torch.Tensor) -> bool:
    half = x.dtype in (torch.bfloat16, torch.float16) and x.dtype == weight.dtype
    return half and stage.dtype == torch.float32 and stage.shape[-1] <= MAX_SIZE


_LINEAR = ShapeClass(
    ("size",),
    ("rows", "inputs", "outputs"),
    lambda x, weight, stage, *_: ((stage.shape[-1],), (*x.shape, weight.shape[0])),
)
# y = scale * (z - bias) + bias, z = x R W^T + bias, for a stage of stride 1; z is empty unless it
# is to be saved and there is a scale.
rotate_linear_forward = Op(
    "rotate_linear(Tensor x, Tensor weight, Tensor stage, Tensor? scale, Tensor? bias, bool save)"
    " -> (Tensor, Tensor)",
    reference=_rotate_linear,
    fake=_fake_rotate_linear,
    samples=lambda w: iter(()),
    kernels={
        "cuda": Kernel(lambda x, weight, stage, *_: _cuda_takes(x, weight, stage)),
        "triton": Kernel(
            lambda x, weight, stage, *_: stage.shape[-1] <= MAX_STAGE, lambda: _of_triton()[0]
        ),
    },
    shape_class=_LINEAR,
)
# -> gradients of x, of the stage (partial sums), and, empty without z, of the scale and the bias
rotate_linear_backward = Op(
    "rotate_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor stage, Tensor? scale,"
    " Tensor? bias, Tensor? z, int splits) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_rotate_linear_backward,
    fake=_fake_rotate_linear_backward,
    samples=lambda w: iter(()),
    kernels={
        "cuda": Kernel(lambda grad, x, weight, stage, *_: _cuda_takes(x, weight, stage)),
        "triton": Kernel(
            lambda grad, x, weight, stage, *_: stage.shape[-1] <= MAX_STAGE, lambda: _of_triton()[1]
        ),
    },
    shape_class=_LINEAR._replace(of=lambda grad, *args: _LINEAR.of(*args)),
    measured_as=rotate_linear_forward,
)


def same_backend(x: torch.Tensor, weight: torch.Tensor, stage: torch.Tensor) -> bool:
    """Whether no measurement wants the parts of ``rotate_linear`` elsewhere than where it goes.

    What was measured of it itself says more than what was measured of its parts.
    """
    if backend.forced() or tuned.measured(rotate_linear_forward.tunable, x, (x, weight, stage)):
        return True
    serving = rotate_linear_forward.defaults["cuda" if x.is_cuda else "cpu"].backend
    size = stage.shape[-1]
    rotation, scale = ((size, size, 1), x.shape), ((), (x.shape[0], weight.shape[0]))
    classes = {rotate_rows: rotation, rotate_backward: rotation}
    classes |= {scale_forward: scale, scale_backward: scale}
    measured = [tuned.lookup(op.tunable, x.device, x.dtype, *c) for op, c in classes.items()]
    return all(choice is None or choice.backend == serving for choice in measured)


def weight_side_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    matrix: torch.Tensor,
    stages: tuple[Stage, ...],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradients of x and, unless x is None, of the stage, of y = x (W R^T)^T.

    W R^T is made again: it is as large as W. As R is orthogonal, dL/dR = x^T (dL/dx) R, in each
    group.
    """
    ((stage,), partials) = stages, []
    rotated = apply_stages(weight, (matrix,), stages, True)
    with autocast.disabled(grad.device.type):
        x_grad = grad @ rotated
        if x is not None:
            parts = gram(x, x_grad, stage.size, stage.chunk, stage.stride, stage.splits(x))
            partials.append((parts.sum(0).to(matrix.dtype) @ matrix)[None])
    return x_grad, partials
