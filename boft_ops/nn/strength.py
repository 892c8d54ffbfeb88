"""``set_strength``: one knob for the adapter of a whole model."""

from __future__ import annotations

from torch import nn

from .._runtime import checks
from .adapter_parameters import HasAdapter
from .multi_adapter import MultiAdapterLinear


def set_strength(model: nn.Module, strength: float, *, adapter: str | None = None) -> nn.Module:
    """Weaken or strengthen what was finetuned, between the pretrained model and beyond it.

    Every block of every R becomes its t-th power and every scale s becomes s^t: 0 gives the
    pretrained layers, 1 the finetuned ones, both exactly. Layers compute as fast as before. Biases
    and ``modules_to_save`` stay as they were trained.

    Args:
        model: an adapted model, or a BOFT layer; unchanged if an error is raised.
        strength: t, a finite number; 1 before training goes on.
        adapter: the name of the adapter to change in each ``MultiAdapterLinear``, alone. None (the
            default) changes all adapters and all BOFT layers.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an nn.Module, or t is no number.
        ValueError: the model has no BOFT layer, or no adapter of that name; t is not finite, or
            neither 0 nor 1 over a scale that is not positive.
        RuntimeError: a layer is merged.
    """
    checks.module("model", model)
    if adapter is None:
        layers = [module for module in model.modules() if isinstance(module, HasAdapter)]
    else:
        shared = [module for module in model.modules() if isinstance(module, MultiAdapterLinear)]
        layers = [layer.adapters[adapter] for layer in shared if adapter in layer.adapters]
    if not layers:
        expected = "BOFT layer" if adapter is None else f"adapter {adapter!r}"
        raise ValueError(f"model: expected at least one {expected}, got none")
    for layer in layers:
        layer.check_strength(strength)
    for layer in layers:
        layer.set_strength(strength)
    for module in model.modules():
        if isinstance(module, MultiAdapterLinear):
            module.forget()
    return model
