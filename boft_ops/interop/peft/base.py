"""Calls the frozen base layer, and reads parameters that hooks bring in.

The formula of torch's class is inlined if the layer is unmodified; otherwise its forward is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..._runtime import autocast


def is_unhooked(module: nn.Module, module_class: type[nn.Module]) -> bool:
    """True if a call of the module is the forward of ``module_class`` and no more."""
    return (
        type(module).forward is module_class.forward
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not _has_any_global_hook()
    )


def onloaded(module: nn.Module) -> AbstractContextManager:
    """Context manager: the parameters of a module that accelerate has offloaded are numbers.

    Offloaded parameters rest on the meta device.
    A hook replaces them for the forward of their module, but some are needed without that: PEFT's
    BOFT keeps its parameters in a ParameterDict, which has no forward.
    """
    hook = getattr(module, "_hf_hook", None)
    return nullcontext() if hook is None else _under(hook, module)


@contextmanager
def _under(hook: object, module: nn.Module) -> Iterator[None]:
    """The module has its own forward in the block, as the hook must not run twice."""
    hooked = module.forward
    hook.pre_forward(module)
    module.forward = module._old_forward
    try:
        yield
    finally:
        module.forward = hooked
        hook.post_forward(module, torch.empty(0))


def is_unmodified(base: nn.Module, base_class: type[nn.Module], x: torch.Tensor) -> bool:
    """True if ``base(x)`` is the formula of ``base_class`` (nn.Linear or nn.Conv2d) and no more.

    Then the layer has torch's forward, no hooks, a plain tensor as weight, and the dtype of x.
    """
    weight = base.weight if isinstance(base, base_class) else None
    return (
        weight is not None
        and (base_class is nn.Linear or type(base)._conv_forward is base_class._conv_forward)
        and is_unhooked(base, base_class)
        and not is_traceable_wrapper_subclass(weight)  # quantized or sharded
        and autocast.cast(weight).dtype == autocast.cast(x).dtype
    )


def call_with_weight(
    base: nn.Module,
    base_class: type[nn.Module],
    weight: torch.Tensor,
    x: torch.Tensor,
    args: tuple,
    kwargs: dict,
) -> torch.Tensor:
    """The output of ``base`` for x (and further arguments) with ``weight`` instead of its own.

    The forward of a subclass is called, with ``weight`` as its parameter during the call.
    """
    if not args and not kwargs and is_unmodified(base, base_class, x):
        return base._conv_forward(x, weight, base.bias)
    return torch.func.functional_call(base, {"weight": weight}, (x, *args), kwargs)
