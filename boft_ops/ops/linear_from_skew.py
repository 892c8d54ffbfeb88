"""A layer of one small stage as one native call each way: from the skew to the output, and back.

Python takes longer to call cayley, compose, rotate, linear and scale one by one than a small layer
takes to compute. One operator of the native library does it all. What it does not serve (several
stages, half precision on a CPU, graphs) goes by the strategies of linear.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .._runtime import autocast
from .._runtime.backend import Kernel, Op
from .._runtime.dtypes import COMPUTE, HALVES
from .._runtime.limits import MAX_ROTATION
from .._runtime.workload import Workload
from .composed_linear import differentiable_gradients
from .rotated_linear import rotated_linear_backward_reference, rotated_linear_reference
from .scale import scale_backward
from .stage_from_skew import stage_from_skew_backward, stage_from_skew_forward
from .stages import plan

# Least magnitude of a scale by which the output is divided to find it as it was before the scale
# (kLeastScale in csrc/binding_layer.h). Below, the rounding of the output beside its bias would be
# too large a part of the result.
LEAST_SCALE = 1 / 1024
# The hooks that would see a saved tensor, or None. Where torch cannot tell, there may be some.
_saved_tensor_hooks = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: True
)


def _reference(x, weight, skew, drop_mask, scale, bias, save_z, fused):
    blocks, stage = stage_from_skew_forward.reference(skew, drop_mask)
    rows, in_z = x.reshape(-1, x.shape[-1]), _is_bias_in_z(x, scale)
    y, z = rotated_linear_reference(rows, weight, stage, scale, bias, in_z, save_z)
    return y.reshape(*x.shape[:-1], weight.shape[0]), z, blocks, stage


def _backward_reference(
    grad, x, weight, blocks, stage, drop_mask, scale, bias, output, is_scaled, splits, fused
):
    rows, in_z = x.reshape(-1, x.shape[-1]), _is_bias_in_z(x, scale)
    center = bias if in_z or is_scaled else None
    if output is not None:
        output = output.reshape(-1, output.shape[-1])
        if is_scaled and bool((scale.abs() < LEAST_SCALE).any()):
            _, output = rotated_linear_reference(rows, weight, stage, scale, bias, in_z, True)
            center, is_scaled = bias if in_z else None, False
    x_grad, stage_grad, scale_grad, bias_grad = rotated_linear_backward_reference(
        grad.reshape(-1, grad.shape[-1]), rows, weight, stage, scale, center, output, splits, fused
    )
    if output is not None and is_scaled:
        scale_grad = scale_grad / scale
    skew_grad = stage_from_skew_backward.reference(blocks, drop_mask, stage_grad)
    return x_grad.reshape(x.shape), skew_grad, scale_grad, bias_grad


def _is_bias_in_z(x: torch.Tensor, scale: torch.Tensor | None) -> bool:
    """True if the output before the scale has the bias in it: see ``rotated_linear``."""
    return scale is None or x.dtype not in HALVES


def _fake(x, weight, skew, drop_mask, scale, bias, save_z, fused):
    m, n_blocks, packed = skew.shape
    b = (1 + round((1 + 8 * packed) ** 0.5)) // 2
    size, n = b << (m - 1), weight.shape[0]
    rows = x.numel() // x.shape[-1] if save_z and scale is not None else 0
    return (
        x.new_empty(*x.shape[:-1], n),
        x.new_empty(rows, n),
        skew.new_empty(m, n_blocks, b, b),
        skew.new_empty(n_blocks * b // size, size, size),
    )


def _fake_backward(
    grad, x, weight, blocks, stage, drop_mask, scale, bias, output, is_scaled, splits, fused
):
    m, n_blocks, b, _ = blocks.shape
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    skew_grad = blocks.new_empty(m, n_blocks, b * (b - 1) // 2)
    n = weight.shape[0]
    if output is not None:
        return x_grad, skew_grad, scale.new_empty(n), scale.new_empty(n)
    return x_grad, skew_grad, stage.new_empty(0), grad.new_empty(n if fused else 0)


def _fits(x: torch.Tensor, weight: torch.Tensor, skew: torch.Tensor, size: int) -> bool:
    compute_dtype = COMPUTE[x.dtype]
    return x.dtype == weight.dtype and skew.dtype == compute_dtype and size <= MAX_ROTATION


def _size_of(skew: torch.Tensor) -> int:
    return round((1 + (1 + 8 * skew.shape[-1]) ** 0.5) / 2) << (skew.shape[0] - 1)


def _cpu_supports(x, weight, skew, *_: object) -> bool:
    return x.dtype == torch.float32 and _fits(x, weight, skew, _size_of(skew))


def _cuda_supports(x, weight, skew, *_: object) -> bool:
    return x.dtype != torch.float64 and _fits(x, weight, skew, _size_of(skew))


def _cpu_supports_backward(grad, x, weight, blocks, stage, *_: object) -> bool:
    return x.dtype == torch.float32 and _fits(x, weight, blocks, stage.shape[-1])


def _cuda_supports_backward(grad, x, weight, blocks, stage, *_: object) -> bool:
    return x.dtype != torch.float64 and _fits(x, weight, blocks, stage.shape[-1])


def _samples(w: Workload) -> Iterator[tuple]:
    stages = plan(w.n_factors, w.block_size, w.device.type)
    if len(stages) > 1 or stages[0].size > MAX_ROTATION or w.dtype == torch.float64:
        return
    weight = w.tensor(w.n, w.d, std=w.d**-0.5)
    scale = 1 + w.tensor(w.n, std=0.1, dtype=w.compute_dtype)
    bias = w.tensor(w.n, salt=1)
    yield w.x(), weight, w.skew(), None, scale, bias, True, False
    yield w.x(), weight, w.skew(), w.drop_mask(), None, None, False, False


def _backward_samples(w: Workload) -> Iterator[tuple]:
    for x, weight, skew, drop_mask, scale, bias, save_z, fused in _samples(w):
        with torch.no_grad():
            blocks, stage = stage_from_skew_forward.reference(skew, drop_mask)
        splits = plan(w.n_factors, w.block_size, w.device.type)[0].splits(x)
        grad, output = (w.tensor(w.rows, w.n, salt=salt) for salt in (1, 2))
        outputs = ((output, True), (output, False)) if save_z else ((None, False),)
        for output, is_scaled in outputs:
            yield (
                *(grad, x, weight, blocks, stage, drop_mask),
                *(scale, bias, output, is_scaled, splits, fused),
            )


# y = scale * (x R W^T) + bias from the skew of R, for one stage of at most MAX_ROTATION features.
#   x (..., d); weight (n, d); skew (m, K, b(b-1)/2); drop_mask (m, K); scale, bias (n,)
#   save_z: return z as well, for the gradient of the scale
#   fused: multiply in the kernel that rotates, on a CPU
# Returns y (..., n); z (rows, n), the output before the scale, with the bias in it but for half
# precision with a scale, and (0, n) unless saved; blocks (m, K, b, b); stage (d/size, size, size).
linear_from_skew_forward = Op(
    "linear_from_skew(Tensor x, Tensor weight, Tensor skew, Tensor? drop_mask, Tensor? scale,"
    " Tensor? bias, bool save_z, bool fused) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    kernels={"cpu": Kernel(_cpu_supports), "cuda": Kernel(_cuda_supports)},
)
# The gradients of x, skew, scale and bias.
#   output: for the gradient of the scale, z or, if is_scaled, y; None if the scale needs none
#   splits: the number of partial sums of the gradient of the stage; 1 on a CPU
# Returns x_grad like x, skew_grad like skew, scale_grad (n,), empty without output, and bias_grad
# (n,), empty without output unless fused.
linear_from_skew_backward = Op(
    "linear_from_skew_backward(Tensor grad, Tensor x, Tensor weight, Tensor blocks, Tensor stage,"
    " Tensor? drop_mask, Tensor? scale, Tensor? bias, Tensor? output, bool is_scaled, int splits,"
    " bool fused) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_fake_backward,
    samples=_backward_samples,
    kernels={"cpu": Kernel(_cpu_supports_backward), "cuda": Kernel(_cuda_supports_backward)},
)


class NativeCall:
    """What is decided once for all calls of one signature.

    Attributes:
        forward, backward: the native operators.
        fused: see ``linear_from_skew``.
        splits: see ``linear_from_skew_backward``.
        keeps_output: False once an output of such a call was found changed in place.
    """

    __slots__ = ("forward", "backward", "fused", "splits", "keeps_output")

    def __init__(self, backend: str, fused: bool, splits: int) -> None:
        of = Op.native if backend == "cuda" else _raw
        self.forward = of(linear_from_skew_forward)
        self.backward = of(linear_from_skew_backward)
        self.fused, self.splits = fused, splits
        self.keeps_output = backend == "cpu"


def _raw(op: Op) -> Callable:
    return op.raw


class LinearFromSkew(torch.autograd.Function):
    """The layer by the native call. It saves x, the blocks, the stage and, for a trained scale, y.

    y is what the consumer of the layer keeps as well, mostly, while z, the output before the scale,
    would be a tensor of its own: z = (y - bias) / scale + bias. Changing y in place is allowed; the
    version of y tells, and z is computed again. y lies beside the saved tensors, where autograd
    would forbid the change. Hooks of saved tensors (checkpoints, offloading) see z.
    """

    @staticmethod
    def forward(ctx, x, weight, scale, bias, skew, drop_mask, native):
        kept = saves_z = False
        if scale is not None and ctx.needs_input_grad[2]:
            kept = native.keeps_output and _saved_tensor_hooks(True) is None
            saves_z = not kept
        y, z, blocks, stage = native.forward(
            x, weight, skew, drop_mask, scale, bias, saves_z, native.fused
        )
        ctx.native = native
        ctx.output = (y.detach(), y._version) if kept else None
        # A gradient of this call needs the numbers of this call. A saved Parameter would show what
        # has been put into its .data since, a detached tensor keeps the memory that it had.
        own = [None if t is None else t.detach() for t in (weight, scale, bias)]
        ctx.save_for_backward(
            x, scale, bias, skew, drop_mask, *own, blocks, stage, z if saves_z else None
        )
        return y

    @staticmethod
    def backward(ctx, grad):
        x, scale, bias, skew, drop_mask, weight, scale_, bias_, blocks, stage, z = ctx.saved_tensors
        needs = need_x, _, need_scale, need_bias, need_skew, _, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            inputs = x, weight, scale, bias, skew, drop_mask, None
            return differentiable_gradients(inputs, "exact", grad, needs)
        native, is_scaled = ctx.native, False
        with autocast.disabled(grad.device.type):  # it may be on in backward alone
            if ctx.output is not None:
                z, version = ctx.output
                is_scaled = z._version == version
                if not is_scaled:  # changed in place: from now on z is saved in its stead
                    native.keeps_output = False
                    call = x, weight, skew.detach(), drop_mask, scale_, bias_, True, native.fused
                    z = native.forward(*call)[1]
                if not torch._C._autograd._get_current_graph_task_keep_graph():
                    ctx.output = None
            x_grad, skew_grad, scale_grad, bias_grad = native.backward(
                *(grad, x, weight, blocks, stage, drop_mask),
                *(scale_, bias_, z, is_scaled, native.splits, native.fused),
            )
        if need_bias and bias_grad.shape[0] == 0:
            bias_grad = grad.flatten(0, -2).sum(0)
        return (
            x_grad if need_x else None,
            None,
            scale_grad if need_scale else None,
            bias_grad.to(bias.dtype) if need_bias else None,
            skew_grad if need_skew else None,
            None,
            None,
        )
