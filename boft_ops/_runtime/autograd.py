"""Gradients of the raw operators, for graphs that hold them as nodes.

Eager code and compiled graphs have the closed forms of the autograd Functions, and never get here.
``torch.export`` and ``torch.distributed.pipelining`` record the operators that a Function calls
instead of the Function, and differentiate these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import autocast


def differentiate(name: str, reference: Callable, library: torch.library.Library) -> None:
    """Give an operator the gradient of its reference, which is computed again in backward.

    Args:
        name: of the operator, with its namespace.
        reference: the operator in plain torch.
        library: the library that defined the operator; it keeps the registration alive.
    """

    def setup_context(ctx, inputs: tuple, output: object) -> None:
        ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
        ctx.others = [None if is_tensor else v for v, is_tensor in zip(inputs, ctx.is_tensor)]
        ctx.save_for_backward(*(v for v, is_tensor in zip(inputs, ctx.is_tensor) if is_tensor))

    def backward(ctx, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        sources = [
            next(saved).detach() if is_tensor else other
            for is_tensor, other in zip(ctx.is_tensor, ctx.others)
        ]
        wanted = [v for v, needed in zip(sources, ctx.needs_input_grad) if needed]
        with torch.enable_grad(), autocast.disabled(wanted[0].device.type):
            for source in wanted:
                source.requires_grad_()
            outputs = reference(*sources)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [(y, g) for y, g in zip(outputs, grads) if g is not None and y.requires_grad]
            found = iter(
                torch.autograd.grad(
                    [y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True
                )
            )
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)

    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)
