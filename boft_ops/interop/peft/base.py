"""How a frozen base layer is called: as the formula of its class where nothing else hangs on the
call, and by its own forward everywhere else."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..._runtime import autocast


def is_plain(base: nn.Module, kind: type[nn.Module], x: torch.Tensor) -> bool:
    """Whether ``base(x)`` is no more than the formula of ``kind`` (nn.Linear or nn.Conv2d): no
    forward of its own, no hooks, a plain tensor as weight, operands of one dtype."""
    weight = base.weight if isinstance(base, kind) else None
    return (
        weight is not None
        and type(base).forward is kind.forward
        and (kind is nn.Linear or type(base)._conv_forward is kind._conv_forward)
        and "forward" not in base.__dict__
        and not (base._forward_hooks or base._forward_pre_hooks)
        and not (base._backward_hooks or base._backward_pre_hooks)
        and not _has_any_global_hook()
        and not is_traceable_wrapper_subclass(weight)  # quantised or sharded
        and autocast.cast(weight).dtype == autocast.cast(x).dtype
    )


def call_with_weight(
    base: nn.Module,
    kind: type[nn.Module],
    weight: torch.Tensor,
    x: torch.Tensor,
    args: tuple,
    kwargs: dict,
) -> torch.Tensor:
    """``base(x)`` with another weight. A subclass computes what it computes, be it padding of its
    own: ``weight`` stands in for its parameter during the call."""
    if not args and not kwargs and is_plain(base, kind, x):
        return base._conv_forward(x, weight, base.bias)
    return torch.func.functional_call(base, {"weight": weight}, (x, *args), kwargs)
