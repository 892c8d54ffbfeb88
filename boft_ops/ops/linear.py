"""The BOFT linear layer as a function (arXiv 2311.06243, sections 3 and 4; docs/linear.md).

A rotated layer is computed by one of four strategies, for rows x and a frozen weight W:

- ``fused``: one C++ kernel rotates x, multiplies by W^T, scales and adds the bias.
- ``batched``: one call makes the launches of rotate, linear and scale.
- ``separate``: rotate, linear and scale are called one by one.
- ``rotate_weight``: W goes through the stages instead of x, and is scaled on its way.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from .._runtime import autocast, backend, checks, internals, tuned
from .._runtime.dtypes import COMPUTE, HALVES, widest
from .composed_linear import composed_linear
from .dropout import draw_mask
from .linear_from_skew import LinearFromSkew, NativeCall, linear_from_skew_forward
from .merged_linear import merged_linear, merged_with_rotation, serves_training
from .planner import WEIGHT_SIDE_ROWS, layer_plan
from .product_choice import Fused, faster_products
from .rotate import rotate_backward, rotate_rows
from .rotated_linear import MIN_ROWS, RotatedLinear, rotated_linear_forward
from .rotation import DenseRotation, Rotation, SkewRotation
from .scale import scale_backward, scale_forward, scale_of
from .stages import Stage

Strategy = Literal["fused", "batched", "separate", "rotate_weight"]
# Types of weights whose numbers lie in one dense memory. Others, such as quantized weights and
# DTensors, are tensors to F.linear alone: nothing else of a layer touches them.
PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


class Plan(NamedTuple):
    """The way in which the calls of one signature are computed.

    Attributes:
        stages: of the butterfly.
        strategy: the way to compute them where ``native`` does not serve.
        native: the one call that does everything, or None.
    """

    stages: tuple[Stage, ...]
    strategy: Strategy
    native: NativeCall | None = None


# --- Strategies -----------------------------------------------------------------------------------

_plans: dict[tuple, Plan] = {}  # call signature -> plan
_generation = 0  # generation of the measurements that the plans rest on


def choose_strategy(
    x: torch.Tensor,
    weight: torch.Tensor,
    rotation: Rotation,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale_base: int = 0,
) -> Plan:
    """Return the plan of a call; eager calls remember it.

    Every check that leads to a decision costs host time. The rules ask only if the rows exceed two
    thresholds, so the signature of a call holds the two answers and not the number of rows: batches
    of ever new sizes find their plan. Where measurements decide, the number counts as well.
    """
    global _generation
    if (
        torch.compiler.is_compiling()
        or internals.tracing_state() is not None  # torch.jit.trace
        or internals.n_dispatch_modes() > 0
        or type(x) is not torch.Tensor
    ):
        return _decide(x, weight, rotation)
    if _generation != tuned.generation:
        _plans.clear()
        _generation = tuned.generation
    outputs, inputs = weight.shape
    rows = x.shape[0] if x.dim() == 2 else x.numel() // inputs
    parameter, kind = rotation[:2]  # skew and method, or matrix and orthogonal
    signature = (
        backend.forced(),
        x.device,
        x.dtype,
        type(parameter),
        parameter.dtype,
        parameter.shape,
        kind,
        outputs,
        rows >= MIN_ROWS,
        rows >= WEIGHT_SIDE_ROWS * outputs,
        weight.is_contiguous(),
        None if scale is None else (scale.dtype, scale.is_contiguous(), scale_base),
        None if bias is None else (bias.dtype, bias.is_contiguous()),
    )
    plan = _plans.get(signature) or _plans.get((signature, rows))
    if plan is None:
        plan = _decide(x, weight, rotation)
        native = _native_call(plan, x, weight, rotation, scale, bias, scale_base)
        plan = plan._replace(native=native)
        if len(_plans) >= tuned.MEMO:  # bounds the memory that measured sizes take
            _plans.clear()
        measured = bool(tuned.table(tuned.device_number(x)).names)
        _plans[(signature, rows) if measured else signature] = plan
    return plan


def _decide(x: torch.Tensor, weight: torch.Tensor, rotation: Rotation) -> Plan:
    # merged_linear computes the gradient of R as that of an orthogonal matrix
    outputs = weight.shape[0] if rotation.is_orthogonal() else None
    stages, rotates_weight = layer_plan(x, *rotation.factors(), outputs)
    if rotates_weight:
        return Plan(stages, "rotate_weight")
    if torch.compiler.is_exporting():  # for any number of rows, while other graphs are for few
        return Plan(stages, "separate")
    found = _kernel_backend(x, weight, rotation, stages)
    if found == "cpu":  # backward takes longer than forward, and there is one strategy for both
        fused = _fused_products(x, weight, rotation, stages).backward
        return Plan(stages, "fused" if fused else "separate")
    # a graph, or a dispatch mode such as a flop counter, is to see the products
    watched = torch.compiler.is_compiling() or internals.n_dispatch_modes() > 0
    if found and len(stages) == 1 and not watched and _parts_agree(found, x, weight, stages):
        return Plan(stages, "batched")
    return Plan(stages, "separate")


def _kernel_backend(
    x: torch.Tensor, weight: torch.Tensor, rotation: Rotation, stages: tuple[Stage, ...]
) -> str | None:
    rows, stage = _operands(x, widest(x.dtype, rotation[0].dtype), stages)
    return rotated_linear_forward.kernel_backend(rows, weight, stage, None, None, True, False)


def _fused_products(
    x: torch.Tensor, weight: torch.Tensor, rotation: Rotation, stages: tuple[Stage, ...]
) -> Fused:
    """The directions in which the fused product of a CPU serves a layer."""
    if _kernel_backend(x, weight, rotation, stages) != "cpu":
        return Fused(False, False)
    rows, stage = _operands(x, widest(x.dtype, rotation[0].dtype), stages)
    chosen = backend.forced() or torch.compiler.is_compiling()
    if chosen or tuned.measured(rotated_linear_forward.tunable, x, (rows, weight, stage)):
        return Fused(True, True)
    return faster_products()


def _operands(
    x: torch.Tensor, dtype: torch.dtype, stages: tuple[Stage, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows, and an empty stage of the right size and dtype, which is all that is looked at."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows, x.new_empty((0, stages[0].size, stages[0].size), dtype=dtype)


def _native_call(
    plan: Plan,
    x: torch.Tensor,
    weight: torch.Tensor,
    rotation: Rotation,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale_base: int,
) -> NativeCall | None:
    """The native call that serves a signature, or None."""
    if isinstance(rotation, DenseRotation) or rotation.method != "exact":
        return None
    if len(plan.stages) > 1 or not weight.is_contiguous() or weight.dim() != 2:
        return None
    if type(rotation.skew) not in PLAIN:
        return None
    for vector, dtype in ((scale, COMPUTE[x.dtype]), (bias, x.dtype)):
        if vector is not None and not (
            vector.dtype == dtype and vector.is_contiguous() and type(vector) in PLAIN
        ):
            return None
    vectors = scale, scale_base, bias
    operands = x, weight, rotation.skew, rotation.drop_mask, *vectors, False, False
    name = linear_from_skew_forward.kernel_backend(*operands)
    if name is None or (name == "cuda" and not _prefers_native(x, weight, rotation, plan.stages)):
        return None
    if plan.strategy == "rotate_weight" or not _parts_agree(name, x, weight, plan.stages):
        return None
    fused = _fused_products(x, weight, rotation, plan.stages)
    return NativeCall(name, fused, scale_base, plan.stages[0].splits(x))


def _prefers_native(
    x: torch.Tensor, weight: torch.Tensor, rotation: Rotation, stages: tuple[Stage, ...]
) -> bool:
    """Return True if the native call serves a layer on a GPU, whose kernels Triton has too.

    On an H200, in bfloat16, it takes the host half the time of Triton's launches, and a layer took
    less time by the clock at every size (docs/cuda.md). Float32 was not timed.
    """
    found = _kernel_backend(x, weight, rotation, stages)
    if found != "triton" or backend.forced():
        return found == "cuda"
    rows, stage = _operands(x, widest(x.dtype, rotation[0].dtype), stages)
    measured = tuned.measured(rotated_linear_forward.tunable, x, (rows, weight, stage))
    return measured is None and x.dtype in HALVES


def _parts_agree(
    backend_name: str, x: torch.Tensor, weight: torch.Tensor, stages: tuple[Stage, ...]
) -> bool:
    """Return True unless a part of the batched op was measured to be faster on another backend.

    A measurement of the whole op counts for more than those of its parts.
    """
    rows, stage = _operands(x, x.dtype, stages)
    if backend.forced() or tuned.measured(rotated_linear_forward.tunable, x, (rows, weight, stage)):
        return True
    size = stage.shape[-1]
    rotation, scale = ((size, size, 1), rows.shape), ((), (rows.shape[0], weight.shape[0]))
    classes = {rotate_rows: rotation, rotate_backward: rotation}
    classes |= {scale_forward: scale, scale_backward: scale}
    measured = [tuned.lookup(op.tunable, x.device, x.dtype, *c) for op, c in classes.items()]
    return all(choice is None or choice.backend == backend_name for choice in measured)


def is_rotated(skew: torch.Tensor) -> bool:
    """Return False if R is known to be the identity: the layer must then equal torch's own exactly.

    Looks at the data, which is free of a host sync only on a CPU; True elsewhere and in graphs,
    which serve other data too.
    """
    if torch.compiler.is_compiling() or internals.tracing_state() is not None or not skew.is_cpu:
        return True
    try:
        return bool(skew.detach().count_nonzero())
    except RuntimeError:  # FakeTensorMode and make_fx have no data to look at
        return True


def is_identity(rotation: Rotation, scale: torch.Tensor | None, scale_base: int = 0) -> bool:
    """Return True if R is known to be the identity and ``scale_base`` + scale to be one.

    The layer must then equal torch's own exactly. It looks at the data as ``is_rotated`` does.
    """
    parameter = rotation[0]  # skew or matrix
    if torch.compiler.is_compiling():
        return False
    if isinstance(rotation, DenseRotation):
        parameter = parameter.detach() - torch.eye(parameter.shape[-1])
    return not is_rotated(parameter) and (
        scale is None or not is_rotated(scale.detach() - (1 - scale_base))
    )


# Function.apply itself looks for transforms of torch.func, which rotated_linear has done.
_apply = super(torch.autograd.Function, LinearFromSkew).apply


# --- Functions ------------------------------------------------------------------------------------


def boft_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    skew: torch.Tensor,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    side: str = "in",
    method: str = "exact",
    dropout: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
    rotation: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer whose weight is multiplied by an orthogonal butterfly matrix R.

    ``side="in"``: y = s * (x R W^T) + bias, as if W were diag(s) W R^T. ``side="out"``:
    y = s * ((x W^T) R^T) + bias, as if W were diag(s) R W. The bias is not rotated. With ``skew``
    at zero and ``scale`` at one the result equals ``F.linear(x, weight, bias)`` bit for bit.
    Up to rounding it does so where that takes a look at ``skew`` and ``scale`` which is not taken:
    in compiled graphs, and in half precision with a bias and a ``scale`` (or on side "out") on
    other devices than a CPU.

    Saved for backward beside ``weight`` (a reference): x (side "in") or x W^T (side "out"), the
    blocks and the stage matrices. A trained ``scale`` keeps the (N, n) output before scaling too:
    its gradient needs it, and computing it again would cost a whole matrix product.

    Args:
        x: (..., d).
        weight: (n, d), in the dtype of x (under autocast both are cast, as by torch's linear).
        skew: (m, K, b(b-1)/2), packed as for ``cayley``; K * b = d (side "in") or n (side "out").
            Any floating dtype; float32 is recommended over half-precision weights.
        scale: (n,) or None.
        bias: (n,) or None, finite, in the dtype of x.
        side: ``"in"`` or ``"out"``.
        method: see ``cayley``.
        dropout: ``(p_component, p_block)`` of ``multiplicative_dropout``, or None for none.
        generator: source of the dropout mask; None is torch's default generator.
        rotation: (features/S, S, S), the groups of R that ``butterfly_groups`` made from ``skew``.
            They are used instead of being computed here. Dropout is in them already, so
            ``dropout`` must be None.

    Returns:
        (..., n) in the dtype of x (the autocast dtype under autocast).

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, ``side`` or ``method`` is unknown, or no butterfly
            of this shape exists; the message lists the nearest valid (n_factors, block_size).
    """
    checks.linear_arguments(x, weight, skew, scale, bias, side, method)
    if rotation is not None:
        checks.rotation("rotation", rotation, skew, dropout)
    drop_mask = None
    if dropout is not None:
        if not (isinstance(dropout, tuple) and len(dropout) == 2):
            raise ValueError(f"dropout: expected (p_component, p_block) or None, got {dropout!r}")
        checks.probability("p_component", dropout[0])
        checks.probability("p_block", dropout[1])
        drop_mask = draw_mask(*skew.shape[:2], *dropout, x.device, generator)
    # on a CPU the identity must stay torch's own layer, bit for bit, which only skew can tell
    if rotation is not None and (x.device.type != "cpu" or is_rotated(skew)):
        chosen = DenseRotation(rotation)
    else:
        chosen = SkewRotation(skew, method, drop_mask)
    return rotated_linear(x, weight, chosen, scale=scale, bias=bias, side=side)


def rotated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    rotation: Rotation,
    *,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    side: str = "in",
    kaleidoscope: int = 0,
    scale_base: int = 0,
) -> torch.Tensor:
    """``boft_linear`` of checked arguments, whose rotation is a ``SkewRotation`` or a dense one.

    With kaleidoscope = l > 0, the rotation is a ``SkewRotation`` whose skew is
    (2 l m, K, b(b-1)/2): R_{1,1}, R_{1,2}, ..., R_{l,1}, R_{l,2}.
    With scale_base = 1, ``scale`` is an offset from one, as layers store it.
    """
    if autocast.enabled(x.device.type):
        x, weight = autocast.cast(x), autocast.cast(weight)
        bias = None if bias is None else autocast.cast(bias)
    # RotatedLinear is for the usual case; differentiable functions are composed for all others
    usual = side == "in" and not kaleidoscope and type(weight) in PLAIN
    usual = usual and not (weight.requires_grad and torch.is_grad_enabled())
    on_cpu_in_half = x.is_cpu and x.dtype in HALVES
    as_torch = on_cpu_in_half and bias is not None and is_identity(rotation, scale, scale_base)
    if not usual or internals.has_transforms():
        scale = scale_of(scale, scale_base)
        return composed_linear(x, weight, rotation, scale, bias, side, kaleidoscope, as_torch)
    if scale is not None and scale.requires_grad and not torch.is_grad_enabled():
        # a Function cannot see no_grad, and would save z for this gradient; torch.jit.trace makes a
        # second graph under no_grad, and expects the first one
        scale = scale.detach() if internals.tracing_state() is None else scale
    stages, strategy, native = choose_strategy(x, weight, rotation, scale, bias, scale_base)
    if native is not None:
        skew, _, drop_mask = rotation
        # a raw operator would lose a tangent, which the Function refuses
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return _apply(x, weight, scale, bias, skew, drop_mask, native)
        call = x, weight, skew, drop_mask, scale, scale_base, bias, False, native.fused
        return native.forward(*call)[0]
    is_dense = isinstance(rotation, DenseRotation)
    # the fused kernel and a merged W round differently from torch's linear where R is I
    if strategy in ("fused", "rotate_weight") and not is_dense and not is_rotated(rotation.skew):
        strategy = "separate"
    if strategy == "rotate_weight":
        trained = scale if scale is not None and scale.requires_grad else None
        if serves_training(x.dtype, trained):
            operands = weight, rotation, scale_of(scale, scale_base), stages, trained is not None
            merged = merged_with_rotation(*operands)
            return merged_linear(x, weight, rotation, scale, bias, merged, scale_base=scale_base)
        strategy = "separate"
    scale = scale_of(scale, scale_base)
    if as_torch and scale is not None:
        strategy = "identity"
    if is_dense:
        plan = None, stages, strategy
        y = RotatedLinear.apply(x, weight, scale, bias, None, None, rotation.matrix, plan)
    else:
        skew, method, drop_mask = rotation
        plan = method, stages, strategy
        y = RotatedLinear.apply(x, weight, scale, bias, skew, drop_mask, None, plan)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])
