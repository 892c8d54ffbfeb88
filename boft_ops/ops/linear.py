"""The BOFT linear layer as a function (arXiv 2311.06243, sections 3 and 4; docs/linear.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._runtime import autocast, checks
from .cayley import cayley
from .dropout import draw_mask, drop_blocks
from .fused_linear import linear_backward, linear_forward
from .kaleidoscope import multiply
from .rotate import apply_stages, apply_stages_backward
from .rotate_linear import rotate_linear_backward, rotate_linear_forward, weight_side_backward
from .scale import Scale, scale_backward, scale_columns
from .stage_from_skew import ALL_GIVEN, GIVEN, make_matrices, make_matrices_backward
from .strategy import decide, is_rotated, known


class RotatedLinear(torch.autograd.Function):
    """y = scale * (x R W^T) + bias with a frozen W: every gradient in closed form.

    Returns rows (N, n), whatever the shape of x: a Function that returned a view of them would
    forbid changing its output in place.
    Saves x, the blocks, the stage matrices and, for a trained scale alone, the output before it.
    Where that was chosen, one stage alone rotates W instead of x: see weight_side_backward.
    """

    @staticmethod
    def forward(ctx, x, weight, skew, scale, bias, drop, method):
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        kind, stages, way = known(rows, weight, skew, method)
        blocks, matrices = make_matrices(skew, drop, stages, method, x.dtype)
        way = way or decide(kind, rows, weight, stages, matrices)
        if way in ("weight side", "fused") and method not in ALL_GIVEN and not is_rotated(skew):
            way = "composed"
        wide_scale = None if scale is None else _scale_like(scale, x)
        save = scale is not None and ctx.needs_input_grad[3]
        if way == "fused":
            rows = apply_stages(rows, matrices[1:], stages[1:], False)
            y, z = linear_forward(rows, weight, matrices[0], wide_scale, bias, save)
        elif way == "launched":
            y, z = rotate_linear_forward(rows, weight, matrices[0], wide_scale, bias, save)
        else:
            # the bias inside the product, as torch's linear has it: see _compose_functions
            if way == "weight side":
                z = F.linear(rows, apply_stages(weight, matrices, stages, True), bias)
            else:
                z = F.linear(apply_stages(rows, matrices, stages, False), weight, bias)
            y = z if scale is None else Scale.forward(z, wide_scale, bias, bias)
        ctx.stages, ctx.way, ctx.method = stages, way, method
        tensors = (x, weight, skew, scale, bias, drop, z if save else None)
        ctx.save_for_backward(*tensors, blocks, *matrices)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, skew, scale, bias, drop, z, blocks, *matrices = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grad)
        need_x, _, need_skew, need_scale, need_bias, *_ = ctx.needs_input_grad
        stages, rows = ctx.stages, x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        grad = grad.contiguous()
        scale_grad = sums = None
        if scale is not None:
            wide_scale = _scale_like(scale, x)
        if ctx.way == "fused":
            inner = apply_stages(rows, matrices[1:], stages[1:], False)
            rows_grad, stage_grad, scale_grad, sums = linear_backward(
                grad, inner, weight, matrices[0], wide_scale if scale is not None else None, z
            )
            x_grad, partials = rows_grad, [stage_grad[None]]
            if len(stages) > 1:
                x_grad, outer = apply_stages_backward(
                    rows_grad, rows if need_skew else None, matrices[1:], stages[1:], False, need_x
                )
                partials += outer
        elif ctx.way == "launched" and need_skew and need_x:
            with autocast.disabled(grad.device.type):  # it may be on in backward alone
                x_grad, partial, scale_grad, sums = rotate_linear_backward(
                    *(grad, rows, weight, matrices[0], None if scale is None else wide_scale),
                    *(bias, z, stages[0].splits(rows)),
                )
            partials = [partial]
            if z is None:
                sums = grad.sum(0) if need_bias else None
        else:
            if need_scale:
                center = None if bias is None else bias.to(wide_scale)
                grad, scale_grad, sums = scale_backward(grad, z, wide_scale, center)
            else:
                sums = grad.sum(0) if need_bias else None
                grad = grad if scale is None else Scale.forward(grad, wide_scale, None, None)
            x_grad, partials = None, []
            if ctx.way == "weight side" and (need_x or need_skew):
                x_grad, partials = weight_side_backward(
                    grad, rows if need_skew else None, weight, matrices[0], stages
                )
            elif need_x or need_skew:
                with autocast.disabled(grad.device.type):
                    rows_grad = grad @ weight
                x_grad, partials = apply_stages_backward(
                    rows_grad, rows if need_skew else None, matrices, stages, False, need_x
                )
        skew_grad = None
        if need_skew:
            skew_grad = make_matrices_backward(skew, blocks, drop, stages, ctx.method, partials)
        return (
            (x_grad if x.dim() == 2 else x_grad.reshape(x.shape)) if need_x else None,
            None,
            skew_grad,
            _as(scale_grad, scale) if need_scale else None,
            _as(sums, bias) if need_bias else None,
            None,
            None,
        )


def _as(grad: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """In the dtype of the parameter; a call of .to() takes longer to find out that it is."""
    return grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype)


def _scale_like(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The scale in the dtype that the kernels compute in."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return scale if scale.dtype == wide else scale.to(wide)


def _differentiable_backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients as functions of everything, for gradients of gradients."""
    *inputs, drop, _ = ctx.saved_tensors[:7]
    wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
    with torch.enable_grad(), autocast.disabled(grad.device.type):
        y = _compose_functions(*inputs, drop, "in", ctx.method).reshape(grad.shape)
        grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return *(next(grads) if need else None for need in ctx.needs_input_grad[:5]), None, None


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
    at zero and ``scale`` at one the result equals ``F.linear(x, weight, bias)`` bit for bit (but in
    compiled graphs, which are made without a look at ``skew``, up to rounding).

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
    drop = None
    if dropout is not None:
        if not (isinstance(dropout, tuple) and len(dropout) == 2):
            raise ValueError(f"dropout: expected (p_component, p_block) or None, got {dropout!r}")
        checks.probability("p_component", dropout[0])
        checks.probability("p_block", dropout[1])
        drop = draw_mask(*skew.shape[:2], *dropout, x.device, generator)
    # On a CPU an identity stays torch's own layer, bit for bit: see is_rotated.
    if rotation is not None and (x.device.type != "cpu" or is_rotated(skew)):
        skew, method = rotation, GIVEN
    return rotated_linear(x, weight, skew, scale, bias, drop, side, method)


def rotated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    skew: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    drop: torch.Tensor | None,
    side: str,
    method: str,
    kaleidoscope: int = 0,
) -> torch.Tensor:
    """``boft_linear`` of checked arguments, with the mask (m, K) of the blocks to drop.

    With kaleidoscope = l, skew is (2 l m, K, b(b-1)/2): R_{1,1}, R_{1,2}, ..., R_{l,1}, R_{l,2}.
    """
    if autocast.enabled(x.device.type):
        x, weight = autocast.cast(x), autocast.cast(weight)
        bias = None if bias is None else autocast.cast(bias)
    # One Function for the usual case; the rest is put together from the package's other functions.
    plain = side == "in" and not (torch.is_grad_enabled() and weight.requires_grad)
    plain = plain and not kaleidoscope
    if plain and not torch._C._are_functorch_transforms_active():
        if scale is not None and scale.requires_grad and not torch.is_grad_enabled():
            scale = scale.detach()  # else the Function would save for it: it cannot see no_grad
        y = RotatedLinear.apply(x, weight, skew, scale, bias, drop, method)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])
    return _compose_functions(x, weight, skew, scale, bias, drop, side, method, kaleidoscope)


def _compose_functions(
    x: torch.Tensor,
    weight: torch.Tensor,
    skew: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    drop: torch.Tensor | None,
    side: str,
    method: str,
    kaleidoscope: int = 0,
) -> torch.Tensor:
    """The layer as functions that are differentiable any number of times, in every argument."""
    blocks = skew[None] if method in ALL_GIVEN else drop_blocks(cayley(skew, method=method), drop)
    if side == "in":
        x = multiply(x, blocks, kaleidoscope)
    # The bias goes into the matrix product, where torch's linear has it, and what the scale and the
    # rotation then do to it is taken back below. Both corrections vanish exactly at the identity.
    y, shift = F.linear(x, weight, bias), bias
    if side == "out":
        y = multiply(y, blocks, kaleidoscope, transpose=True)
        if bias is not None:
            shift = multiply(bias, blocks, kaleidoscope, transpose=True)
    if scale is None:
        return y if side == "in" or bias is None else y + (bias - shift)
    return scale_columns(y, scale, shift, bias)
