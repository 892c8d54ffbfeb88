"""Calls the frozen base layer.

The formula of torch's class is inlined if the layer is unmodified; otherwise its forward is called.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..._runtime import autocast


def is_unmodified(base: nn.Module, base_class: type[nn.Module], x: torch.Tensor) -> bool:
    """True if ``base(x)`` is the formula of ``base_class`` (nn.Linear or nn.Conv2d) and no more.

    Then the layer has torch's forward, no hooks, a plain tensor as weight, and the dtype of x.
    """
    weight = base.weight if isinstance(base, base_class) else None
    return (
        weight is not None
        and type(base).forward is base_class.forward
        and (base_class is nn.Linear or type(base)._conv_forward is base_class._conv_forward)
        and "forward" not in base.__dict__
        and not (base._forward_hooks or base._forward_pre_hooks)
        and not (base._backward_hooks or base._backward_pre_hooks)
        and not _has_any_global_hook()
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
