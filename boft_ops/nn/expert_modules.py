"""Facts about experts of transformers, whose weights are 3-D parameters."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .rotated_weight import is_dense

GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"


def projections(module: nn.Module) -> tuple[str, str]:
    """The names of the weights of experts: "gate_up_proj" or "up_proj", then "down_proj"."""
    return (GATE_UP if getattr(module, "has_gate", True) else UP), DOWN


def between(module: nn.Module) -> str:
    """The name of what experts call between their projections: their gate or their activation."""
    return "_apply_gate" if getattr(module, "has_gate", True) else "act_fn"


def has_between(base: nn.Module) -> bool:
    """True if experts call ``between``, so that rows can be rotated there."""
    name = between(base)
    return name in base._modules or hasattr(type(base), name)


def call_between(base: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """``between`` of the experts themselves, whatever has been put in its place."""
    name = between(base)
    inner = base._modules.get(name)
    return getattr(type(base), name)(base, y) if inner is None else inner(y)


def is_experts(module: nn.Module) -> bool:
    """True if ``module`` holds experts as transformers has them, quantized or not."""
    weights = [getattr(module, name, None) for name in projections(module)]
    if any(isinstance(w, nn.Module) or len(getattr(w, "shape", ())) != 3 for w in weights):
        return False
    is_counted = isinstance(getattr(module, "num_experts", None), int)
    return is_counted and len(inspect.signature(type(module).forward).parameters) >= 4


def features(base: nn.Module, projection: str) -> tuple[int, int]:
    """Inputs and outputs of a projection of one expert."""
    weight = getattr(base, projection)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        n, d = weight.shape[1:]
        return (n, d) if is_transposed(base) else (d, n)
    # packed integers: the sizes are in attributes, under one name or the other
    hidden = getattr(base, "hidden_dim", None) or base.hidden_size
    inner = getattr(base, "intermediate_dim", None) or base.intermediate_size
    if projection == DOWN:
        return inner, hidden
    return hidden, (2 if projection == GATE_UP else 1) * inner


def is_transposed(base: nn.Module) -> bool:
    """True if the weights are (E, d, n), not (E, n, d)."""
    return getattr(base, "is_transposed", False)


def has_bias(base: nn.Module) -> bool:
    """True if the projections have biases (E, n)."""
    return getattr(base, f"{DOWN}_bias", None) is not None


def is_plain(weight: Any) -> bool:
    """True for numbers that another weight can be computed from: no packed ones, fp8 or shards."""
    is_tensor = isinstance(weight, torch.Tensor) and is_dense(weight)
    return is_tensor and weight.is_floating_point() and weight.element_size() > 1


def remedy(base: nn.Module) -> str:
    """The end of an error message: the way to load the experts in a form that takes all options."""
    if any(cls.__name__ == "Mxfp4GptOssExperts" for cls in type(base).__mro__):
        return "; Mxfp4Config(dequantize=True) loads the model with experts that take both"
    return ""
