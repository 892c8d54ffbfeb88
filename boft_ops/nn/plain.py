"""Whether a layer is no more than torch's own, so that another one may take its place."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def check_forward(base: nn.Module, kind: type[nn.Module]) -> None:
    """Raise TypeError unless ``base`` computes what torch's layer of that kind does."""
    for method in ("forward", "_conv_forward"):
        if getattr(type(base), method, None) is not getattr(kind, method, None):
            raise TypeError(
                f"expected a plain {kind.__name__}, got {type(base).__name__} with its own "
                f"{method}(), which another layer in its place would lose"
            )


def check_untouched(base: nn.Module) -> None:
    """Raise ValueError if there is more to a call of ``base`` than the forward of its class."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks)
    if (
        any((*hooks, base._backward_pre_hooks))
        or parametrize.is_parametrized(base)
        or "forward" in vars(base)
    ):
        raise ValueError(
            f"expected a {type(base).__name__} without hooks and parametrizations, and with its "
            "class's forward(), got one that has some, which another layer in its place would lose"
        )
