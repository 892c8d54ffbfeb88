"""Scale of a layer's outputs around a center: y = scale * (x - center) + bias, per column."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._runtime.backend import Kernel, Op
from .._runtime.dtypes import COMPUTE
from .._runtime.tuned import ShapeClass
from .._runtime.workload import Workload


def scale_of(offset: torch.Tensor | None, base: int = 1) -> torch.Tensor | None:
    """The scale of which layers store the offset from ``base``, in at least float32; or None.

    A half-precision number near one has steps of 0.004 to 0.008, which are lost beside a one but
    not beside a zero: so parameters are offsets, and the sum is taken in a wider dtype.
    """
    if offset is None or base == 0:
        return offset
    wide = COMPUTE[offset.dtype]
    return (offset if offset.dtype == wide else offset.to(wide)) + base


def offset_of(scale: torch.Tensor) -> torch.Tensor:
    """The offset of a scale from one, in at least float32."""
    return (scale.double() - 1).to(COMPUTE[scale.dtype])


def scale_reference(
    x: torch.Tensor,
    scale: torch.Tensor,
    center: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    if bias is None:
        return _times(x, scale)
    if center is None:  # in the compute dtype, and rounded once
        wide = COMPUTE[x.dtype]
        return torch.addcmul(bias.to(wide), x.to(wide), scale.to(wide)).to(x.dtype)
    # exactly x where scale is 1 and center is bias: the vector below is then exactly 0
    shift = (bias - scale * center).to(x.dtype)
    if torch.finfo(x.dtype).bits >= 32:
        return torch.addcmul(shift, x, scale)
    return _times(x, scale) + shift


def _fake_scale(
    x: torch.Tensor,
    scale: torch.Tensor,
    center: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def scale_backward_reference(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor | None, center: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = COMPUTE[x.dtype]
    dtype = wide if scale is None else scale.dtype
    # x - center before the sum: sum(grad x) - center sum(grad) would cancel where center is large
    centered = x.to(wide) if center is None else x.to(wide) - center.to(wide)
    scale_grad = torch.sum(grad.to(wide) * centered, 0).to(dtype)
    x_grad = grad.new_empty(0, grad.shape[1]) if scale is None else _times(grad, scale)
    return x_grad, scale_grad, torch.sum(grad, 0, dtype=wide).to(dtype)


def _times(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if torch.finfo(x.dtype).bits >= 32:
        return x * scale
    # x + x (scale - 1): rounding the scale itself to 8 or 11 bits would undo small changes of it
    return torch.addcmul(x, x, (scale - 1).to(x.dtype))


def _fake_scale_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor | None, center: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = x.shape[1]
    if scale is None:
        return x.new_empty(0, n), *(x.new_empty(n, dtype=COMPUTE[x.dtype]) for _ in range(2))
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    return x_grad, torch.empty_like(scale), torch.empty_like(scale)


def _in_compute_dtype(x: torch.Tensor, *vectors: torch.Tensor | None) -> bool:
    """True if the vectors have the dtype that x is computed in."""
    return all(v is None or v.dtype == COMPUTE[x.dtype] for v in vectors)


def _samples(w: Workload) -> Iterator[tuple]:
    x, scale, center = _sample_vectors(w)
    yield x, scale, center, center
    yield x, scale, None, center
    yield x, scale, None, None


def _backward_samples(w: Workload) -> Iterator[tuple]:
    x, scale, center = _sample_vectors(w)
    grad = w.tensor(w.rows, w.n, salt=1)
    yield grad, x, scale, center
    yield grad, x, scale, None
    yield grad, x, None, None


def _sample_vectors(w: Workload) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale, center = (w.tensor(w.n, salt=salt, dtype=w.compute_dtype) for salt in (0, 1))
    return w.tensor(w.rows, w.n), scale, center


def _class_of(x: torch.Tensor, *_: object) -> tuple[tuple, tuple]:
    return (), tuple(x.shape)


def _cpu_supports(x, scale, center, bias) -> bool:
    return x.dtype != torch.float16


def _cuda_supports(x, scale, center, bias) -> bool:
    return _in_compute_dtype(x, scale)


def _cuda_supports_backward(grad, x, scale, center) -> bool:
    return _in_compute_dtype(x, scale, center)


def _cpu_supports_backward(grad, x, scale, center) -> bool:
    return x.dtype != torch.float16 and _in_compute_dtype(x, scale, center)


_CLASS = ShapeClass((), ("rows", "features"), _class_of)
scale_forward = Op(
    # without a center or a bias it is 0; there is no center without a bias
    "scale(Tensor x, Tensor scale, Tensor? center, Tensor? bias) -> Tensor",
    reference=scale_reference,
    fake=_fake_scale,
    samples=_samples,
    kernels={
        "cpu": Kernel(_cpu_supports),
        "cuda": Kernel(_cuda_supports),
        "triton": Kernel(None, "scale:scale", "config_scale:FORWARD"),
    },
    shape_class=_CLASS,
)
scale_backward = Op(
    # Without a center it is 0. Without a scale the gradient of x is not wanted: it is (0, n). The
    # sums of grad, the gradient of the bias, are as wide as scale, or as COMPUTE without one.
    "scale_backward(Tensor grad, Tensor x, Tensor? scale, Tensor? center)"
    " -> (Tensor, Tensor, Tensor)",
    reference=scale_backward_reference,
    fake=_fake_scale_backward,
    samples=_backward_samples,
    kernels={
        "cpu": Kernel(_cpu_supports_backward),
        "cuda": Kernel(_cuda_supports_backward),
        "triton": Kernel(None, "scale:scale_backward", "config_scale:BACKWARD"),
    },
    shape_class=_CLASS,
)


class Scale(torch.autograd.Function):
    """y = scale * (x - center) + bias for rows x. One pass over them gives all the gradients.

    Saves x only if the scale is trained: its gradient is the column sum of grad * (x - center).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale, center, bias):
        if torch.compiler.is_compiling():
            return scale_reference(x, scale, center, bias)  # Inductor fuses it with its neighbors
        return scale_forward(x, scale, center, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, center, bias = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale, center)

    @staticmethod
    def backward(ctx, grad):
        x, scale, center = ctx.saved_tensors
        scale_grad = None
        if x is None:
            x_grad = Scale.forward(grad.contiguous(), scale, None, None)
            sums = grad.sum(0) if ctx.bias_dtype else None
        else:
            x_grad, scale_grad, sums = scale_backward(grad.contiguous(), x, scale, center)
        if ctx.bias_dtype is None:
            return x_grad, scale_grad, None, None
        center_grad = None if center is None else (-scale * sums).to(center.dtype)
        return x_grad, scale_grad, center_grad, sums.to(ctx.bias_dtype)


def scale_columns(
    x: torch.Tensor,
    scale: torch.Tensor,
    center: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """scale * (x - center) + bias for x (..., n) and vectors (n,), in the dtype of x.

    ``scale`` may be of a wider dtype than x. There is no center without a bias.
    """
    if torch.finfo(x.dtype).bits >= 32:
        scale = scale.to(x.dtype)
    # The Function saves views: a Parameter itself would show it data that was put there later.
    # Dynamo, too, wants no tensor twice among its inputs, as center and bias may be.
    scale = scale.view_as(scale)
    center = None if center is None else center.view_as(center)
    rows = (x.flatten(0, -2) if x.dim() > 1 else x[None]).contiguous()
    return Scale.apply(rows, scale, center, bias).reshape(x.shape)
