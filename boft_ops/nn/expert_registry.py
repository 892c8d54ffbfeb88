"""Experts of transformers that call another module inside of their own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .expert_modules import between, has_between

NAME = "boft_ops"  # the name of the implementation in a registry of transformers


class _Config:
    """The config of a model for its rotated experts: only their implementation is another one."""

    _experts_implementation = NAME

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        if name == "config" or name.startswith("__"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.config, name)


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


def implementation_of(base: nn.Module) -> str | None:
    """The name of the implementation that the model chose for connected experts."""
    return base.config.config._experts_implementation


def connect(
    base: nn.Module,
    forward: Callable[..., torch.Tensor],
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Make experts of a registry call ``forward``, and all call ``activation`` between products."""
    if is_registered(base):
        registry_of(base).register(NAME, _implementation)
        if not isinstance(base.config, _Config):
            base.config = _Config(base.config)
    base._boft_forward = forward
    if has_between(base):
        vars(base)[between(base)] = activation  # found before a submodule of that name


def disconnect(base: nn.Module) -> None:
    """Undo ``connect``."""
    vars(base).pop("_boft_forward", None)
    if has_between(base):
        vars(base).pop(between(base), None)
    if isinstance(getattr(base, "config", None), _Config):
        base.config = base.config.config


def _implementation(self: nn.Module, *arguments: torch.Tensor, **named: torch.Tensor):
    """The implementation in a registry of transformers: ``self`` are the frozen experts."""
    return self._boft_forward(*arguments, **named)
