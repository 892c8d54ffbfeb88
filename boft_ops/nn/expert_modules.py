"""Facts about experts of transformers, whose weights are 3-D parameters."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .rotated_weight import is_dense

UP, DOWN = PROJECTIONS = "gate_up_proj", "down_proj"


def is_experts(module: nn.Module) -> bool:
    """True if ``module`` holds gated experts as transformers has them, quantized or not."""
    weights = [getattr(module, name, None) for name in PROJECTIONS]
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
    return (hidden, 2 * inner) if projection == UP else (inner, hidden)


def is_transposed(base: nn.Module) -> bool:
    """True if the weights are (E, d, n), not (E, n, d)."""
    return getattr(base, "is_transposed", False)


def has_bias(base: nn.Module) -> bool:
    """True if the projections have biases (E, n)."""
    return getattr(base, f"{UP}_bias", None) is not None


def is_plain(weight: Any) -> bool:
    """True for numbers that another weight can be computed from: no packed ones, fp8 or shards."""
    is_tensor = isinstance(weight, torch.Tensor) and is_dense(weight)
    return is_tensor and weight.is_floating_point() and weight.element_size() > 1


def is_registered(base: nn.Module) -> bool:
    """True if transformers looks up the implementation of the experts in a registry."""
    return hasattr(base, "_is_expert_parallel") and hasattr(base, "config")


def registry_of(base: nn.Module) -> Any:
    """The registry in which transformers looks up the implementation of the experts."""
    if any(cls.__name__ == "FP8Experts" for cls in type(base).__mro__):
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

        return ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS
