"""A layer of one small stage as one native call each way: from the skew to the output, and back.

Python takes longer to call cayley, compose, rotate, linear and scale one by one than a small layer
takes to compute. One operator of the native library does it all. What it does not serve (several
stages, half precision on a CPU, graphs) goes by the strategies of linear.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .._runtime import autocast, checks, internals
from .._runtime.backend import Kernel, Op
from .._runtime.device import devices_of
from .._runtime.dtypes import COMPUTE, HALVES
from .._runtime.limits import MAX_ROTATION
from .._runtime.workload import Workload
from .cayley import fake_cayley
from .composed_linear import differentiable_gradients
from .rotated_linear import rotated_linear_backward_reference, rotated_linear_reference
from .scale import scale_of
from .stage_from_skew import (
    flops_of_skew_gradient,
    flops_of_stage_from_skew,
    stage_from_skew_backward,
    stage_from_skew_forward,
)
from .stages import plan

# Least magnitude of a scale by which the output is divided to find it as it was before the scale,
# kLeastScale in csrc/binding_layer.cpp. Below, the rounding of the output beside its bias would be
# too large a part of the result.
LEAST_SCALE = 1 / 1024
# Devices on which the output is kept in the place of z. On a GPU nobody looks whether a scale is
# zero, which would cost a sync, and kernels of other packages write into outputs without raising
# their version.
KEEP_OUTPUT = ("cpu",)


def _reference(x, weight, skew, drop_mask, scale, scale_base, bias, save_z, fused):
    blocks, stage = stage_from_skew_forward.reference(skew, drop_mask)
    scale = scale_of(scale, scale_base)
    rows, in_z = x.reshape(-1, x.shape[-1]), _is_bias_in_z(x, scale)
    y, z = rotated_linear_reference(rows, weight, stage, scale, bias, in_z, save_z)
    rotation = torch.cat([blocks.flatten(), stage.flatten()])
    return y.reshape(*x.shape[:-1], weight.shape[0]), z, rotation


def _backward_reference(
    grad, x, weight, skew, rotation, drop_mask, scale, scale_base, bias, output, is_scaled, splits,
    need_bias, fused,
):  # fmt: skip
    m, n_blocks, b, size = _shape_of(skew)
    scale = scale_of(scale, scale_base)
    n_numbers = m * n_blocks * b * b
    blocks = rotation[:n_numbers].view(m, n_blocks, b, b)
    stage = rotation[n_numbers:].view(-1, size, size)
    rows, in_z = x.reshape(-1, x.shape[-1]), _is_bias_in_z(x, scale)
    center = bias if in_z or is_scaled else None
    if output is not None:
        output = output.reshape(-1, output.shape[-1])
        if is_scaled and bool((scale.abs() < LEAST_SCALE).any()):
            _, output = rotated_linear_reference(rows, weight, stage, scale, bias, in_z, True)
            center, is_scaled = bias if in_z else None, False
    x_grad, stage_grad, scale_grad, bias_grad = rotated_linear_backward_reference(
        *(grad.reshape(-1, grad.shape[-1]), rows, weight, stage),
        *(scale, center, output, splits, need_bias),
    )
    if output is not None and is_scaled:
        scale_grad = scale_grad / scale
    skew_grad = stage_from_skew_backward.reference(blocks, drop_mask, stage_grad)
    bias_grad = bias_grad.to(skew.dtype) if need_bias else skew.new_empty(0)
    return x_grad.reshape(x.shape), skew_grad, scale_grad, bias_grad


def _shape_of(skew: torch.Tensor) -> tuple[int, int, int, int]:
    """m factors, K blocks in each, b rows of a block, and the features of a group."""
    m, n_blocks, packed = skew.shape
    b = checks.block_size_from_packed("skew", packed)
    return m, n_blocks, b, b << (m - 1)


def _is_bias_in_z(x: torch.Tensor, scale: torch.Tensor | None) -> bool:
    """True if the output before the scale has the bias in it: see ``rotated_linear``."""
    return scale is None or x.dtype not in HALVES


def _fake(x, weight, skew, drop_mask, scale, scale_base, bias, save_z, fused):
    m, n_blocks, b, size = _shape_of(skew)
    n = weight.shape[0]
    rows = x.numel() // x.shape[-1] if save_z and scale is not None else 0
    rotation = skew.new_empty(n_blocks * b * (m * b + size))
    return x.new_empty(*x.shape[:-1], n), x.new_empty(rows, n), rotation


def _fake_backward(
    grad, x, weight, skew, rotation, drop_mask, scale, scale_base, bias, output, is_scaled, splits,
    need_bias, fused,
):  # fmt: skip
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    skew_grad = torch.empty_like(skew, memory_format=torch.contiguous_format)
    n = weight.shape[0]
    scale_grad = skew.new_empty(n if output is not None else 0)
    return x_grad, skew_grad, scale_grad, skew.new_empty(n if need_bias else 0)


def _cuda_supports(x, weight, skew, *_: object) -> bool:
    fits = x.dtype == weight.dtype and skew.dtype == COMPUTE[x.dtype] and weight.is_contiguous()
    return fits and x.dtype != torch.float64 and _shape_of(skew)[3] <= MAX_ROTATION


def _cpu_supports(x, weight, skew, *_: object) -> bool:
    return x.dtype == torch.float32 and _cuda_supports(x, weight, skew)


def _cuda_supports_backward(grad, x, weight, skew, *_: object) -> bool:
    return _cuda_supports(x, weight, skew)


def _cpu_supports_backward(grad, x, weight, skew, *_: object) -> bool:
    return _cpu_supports(x, weight, skew)


def _samples(w: Workload) -> Iterator[tuple]:
    stages = plan(w.n_factors, w.block_size, w.device.type)
    if len(stages) > 1 or stages[0].size > MAX_ROTATION or w.dtype == torch.float64:
        return
    weight = w.tensor(w.n, w.d, std=w.d**-0.5)
    offset = w.tensor(w.n, std=0.1, dtype=w.compute_dtype)
    bias = w.tensor(w.n, salt=1)
    yield w.x(), weight, w.skew(), None, offset, 1, bias, True, False
    yield w.x(), weight, w.skew(), w.drop_mask(), None, 0, None, False, False


def _backward_samples(w: Workload) -> Iterator[tuple]:
    for x, weight, skew, drop_mask, scale, base, bias, save_z, fused in _samples(w):
        with torch.no_grad():
            rotation = _reference(x, weight, skew, drop_mask, scale, base, bias, False, False)[2]
        splits = plan(w.n_factors, w.block_size, w.device.type)[0].splits(x)
        grad, z = (w.tensor(w.rows, w.n, salt=salt) for salt in (1, 2))
        output = z if save_z else None
        yield (
            *(grad, x, weight, skew, rotation, drop_mask, scale, base, bias),
            *(output, False, splits, output is not None, fused),
        )


def _flops(x, weight, skew, *_: object) -> int:
    return flops_of_stage_from_skew(skew) + _flops_of_rows(x, weight, skew, 1)


def _flops_of_backward(grad, x, weight, skew, *_: object) -> int:
    return flops_of_skew_gradient(fake_cayley(skew)) + _flops_of_rows(x, weight, skew, 2)


def _flops_of_rows(x: torch.Tensor, weight: torch.Tensor, skew: torch.Tensor, passes: int) -> int:
    return 2 * x.numel() * (weight.shape[0] + passes * _shape_of(skew)[3])


# y = s * (x R W^T) + bias from the skew of R, for one stage of at most MAX_ROTATION features.
#   x (..., d); weight (n, d); skew (m, K, b(b-1)/2); drop_mask (m, K); scale, bias (n,)
#   scale_base: s is scale_base + scale, added in the compute dtype; 1 for the offset that layers
#     store
#   save_z: return z as well, for the gradient of the scale
#   fused: multiply in the kernel that rotates, on a CPU
# Returns y (..., n); z (rows, n), the output before the scale, with the bias in it but for half
# precision with a scale, and (0, n) unless saved; and `rotation`, the numbers of the blocks
# (m, K, b, b) and then of the stage (d/size, size, size): one tensor costs less than two.
linear_from_skew_forward = Op(
    "linear_from_skew(Tensor x, Tensor weight, Tensor skew, Tensor? drop_mask, Tensor? scale,"
    " int scale_base, Tensor? bias, bool save_z, bool fused) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    kernels={"cpu": Kernel(_cpu_supports), "cuda": Kernel(_cuda_supports)},
    flops=_flops,
)
# The gradients of x, skew, scale and bias.
#   rotation: as the forward op returned it
#   output: for the gradient of the scale, z or, if is_scaled, y; None if the scale needs none
#   splits: the number of partial sums of the gradient of the stage; 1 on a CPU
#   need_bias: sum up the gradient of the bias, for which there has to be an output, or fused
# Returns x_grad like x, skew_grad like skew, scale_grad (n,), empty without output, and bias_grad
# (n,), empty unless need_bias; the last two in the dtype of skew.
linear_from_skew_backward = Op(
    "linear_from_skew_backward(Tensor grad, Tensor x, Tensor weight, Tensor skew, Tensor rotation,"
    " Tensor? drop_mask, Tensor? scale, int scale_base, Tensor? bias, Tensor? output,"
    " bool is_scaled, int splits, bool need_bias, bool fused) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_fake_backward,
    samples=_backward_samples,
    kernels={"cpu": Kernel(_cpu_supports_backward), "cuda": Kernel(_cuda_supports_backward)},
    flops=_flops_of_backward,
)


def _is_dispatched(grad: torch.Tensor) -> bool:
    """True if torch's dispatcher has to see the gradients of a call.

    Batched gradients come by torch.func.vmap or by the older vmap of autograd, and a dispatch mode,
    such as a flop counter, may watch backward alone.
    """
    return (
        type(grad) is not torch.Tensor
        or internals.has_transforms()
        or internals.is_legacy_batched(grad)
        or internals.n_dispatch_modes() > 0
    )


def _kernel(op: Op, backend: str) -> Callable:
    (device,) = devices_of(backend)
    return internals.undispatched(op.native() if backend == "cuda" else op.raw, device)


class NativeCall:
    """The decisions for all calls of one signature.

    Attributes:
        forward, backward: the native operators.
        fused, fused_backward, scale_base: see ``linear_from_skew``.
        splits: see ``linear_from_skew_backward``.
        keeps_output: True to keep the output in the place of z, until an output of such a call is
            found changed in place.
    """

    __slots__ = (
        *("backward", "forward", "fused", "fused_backward"),
        *("keeps_output", "scale_base", "splits"),
    )

    def __init__(
        self, backend: str, fused: tuple[bool, bool], scale_base: int, splits: int
    ) -> None:
        self.forward = _kernel(linear_from_skew_forward, backend)
        self.backward = _kernel(linear_from_skew_backward, backend)
        self.fused, self.fused_backward = fused
        self.scale_base, self.splits = scale_base, splits
        self.keeps_output = backend in KEEP_OUTPUT


class LinearFromSkew(torch.autograd.Function):
    """The layer by the native call. It saves x, the rotation and, for a trained scale, y.

    y is what the consumer of the layer keeps as well, mostly, while z, the output before the scale,
    would be a tensor of its own: z = (y - bias) / scale + bias. Changing y in place is allowed; the
    version of y tells, and z is computed again. y lies beside the saved tensors, where autograd
    would forbid the change. Hooks of saved tensors (checkpoints, offloading) see z.
    """

    @staticmethod
    def forward(ctx, x, weight, scale, bias, skew, drop_mask, native):
        keeps = saves = False
        if scale is not None and ctx.needs_input_grad[2]:
            keeps = native.keeps_output and internals.saved_tensor_hooks(True) is None
            saves = not keeps
        ctx.native, ctx.vectors = native, (scale, bias)
        # A gradient of this call needs the numbers of this call. A saved Parameter would show what
        # has been put into its .data since, a detached tensor keeps the memory that it had. A call
        # with plain tensors takes less time, too.
        weight = weight.detach()
        scale = None if scale is None else scale.detach()
        bias = None if bias is None else bias.detach()
        y, z, rotation = native.forward(
            x, weight, skew, drop_mask, scale, native.scale_base, bias, saves, native.fused
        )
        ctx.output = (y.detach(), y._version) if keeps else None
        z = z if saves else None
        ctx.save_for_backward(x, skew, drop_mask, rotation, weight, scale, bias, z)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, skew, drop_mask, rotation, weight, scale, bias, z = ctx.saved_tensors
        needs = need_x, _, need_scale, need_bias, need_skew, _, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            inputs = x, weight, *ctx.vectors, skew, drop_mask, None
            return differentiable_gradients(inputs, "exact", grad, needs, ctx.native.scale_base)
        if autocast.enabled(grad.device.type):  # it may be on in backward alone
            with autocast.disabled(grad.device.type):
                return LinearFromSkew.backward(ctx, grad)
        native, is_scaled = ctx.native, False
        base = native.scale_base
        if ctx.output is not None:
            z, version = ctx.output
            is_scaled = z._version == version
            if not is_scaled:  # changed in place: from now on z is saved in its stead
                native.keeps_output = False
                call = x, weight, skew, drop_mask, scale, base, bias, True, native.fused
                z = native.forward(*call)[1]
            if not internals.keeps_graph():
                ctx.output = None
        sums_bias = need_bias and (z is not None or native.fused_backward)
        run = linear_from_skew_backward if _is_dispatched(grad) else native.backward
        x_grad, skew_grad, scale_grad, bias_grad = run(
            *(grad, x, weight, skew, rotation, drop_mask, scale, base, bias),
            *(z, is_scaled, native.splits, sums_bias, native.fused_backward),
        )
        if need_bias:
            bias_grad = bias_grad if sums_bias else grad.flatten(0, -2).sum(0)
            bias_grad = bias_grad.to(bias.dtype)
        return (
            x_grad if need_x else None,
            None,
            scale_grad if need_scale else None,
            bias_grad if need_bias else None,
            skew_grad if need_skew else None,
            None,
            None,
        )
