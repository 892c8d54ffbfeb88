"""The parameters of an adapter: the numbers that make the identity, and states that are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from .._runtime import checks
from ..ops.scale import scale_of
from .config import Options, RotationConfig
from .dropout import MultiplicativeDropout
from .powers import HasStrength


class HasAdapter(HasStrength):
    """Mixin for modules with a config, ``rotated_features``, skew, ``scale_offset`` and a dropout.

    A module that gets memory after it was built on the meta device starts as the identity:
    ``to_empty`` alone would leave whatever the memory held before, and no pretrained checkpoint
    brings numbers for an adapter.
    """

    config: RotationConfig
    rotated_features: int
    skew: nn.Parameter
    scale_offset: nn.Parameter | None
    dropout: MultiplicativeDropout

    @property
    def block_size(self) -> int:
        return self.config.block_size

    @property
    def n_factors(self) -> int:
        return self.config.n_factors

    @property
    def side(self) -> str:
        return self.config.side

    @property
    def method(self) -> str:
        return self.config.method

    @property
    def kaleidoscope(self) -> int:
        return self.config.kaleidoscope

    @property
    def whole_skew_shape(self) -> tuple[int, ...]:
        """The shape of ``skew`` where it is not a shard."""
        return self.config.skew_shape(self.rotated_features)

    def options(self) -> Options:
        """The keyword arguments that make another module like this one."""
        # The dropout module may be changed between trainings.
        dropout = {"p_component": self.dropout.p_component, "p_block": self.dropout.p_block}
        return replace(self.config, scale=self.scale_offset is not None, **dropout).options()

    @property
    def scale(self) -> torch.Tensor | None:
        """The scale, 1 + ``scale_offset`` in at least float32, differentiable; None without one.

        It is a new tensor each time: writing into it changes nothing. ``scale_offset`` is what is
        trained.
        """
        return scale_of(self.scale_offset)

    def reset_adapter(self) -> None:
        """Make the adapter the identity: skew zero, scale one."""
        with torch.no_grad():
            self.skew.zero_()
            if self.scale_offset is not None:
                self.scale_offset.zero_()

    def _check_state(self, state_dict: Mapping[str, torch.Tensor], prefix: str) -> None:
        """Raise ValueError for a state that holds the scale in the place of ``scale_offset``."""
        if f"{prefix}scale" in state_dict:
            raise ValueError(
                f"{prefix}scale: expected {prefix}scale_offset, which is the scale minus one, got "
                "the scale itself, from a state dict of another version"
            )

    def _apply(self, fn, recurse=True):
        was_meta = self._is_meta()
        super()._apply(fn, recurse)
        if was_meta and not self._is_meta():
            self.reset_adapter()
        return self

    def _is_meta(self) -> bool:
        skew = self._parameters.get("skew")
        return skew is not None and skew.is_meta


def reset_adapters(model: nn.Module) -> nn.Module:
    """Make every adapter of a model the identity: skews zero, scales one.

    A model that was built on the meta device and got memory by ``to_empty`` starts so by itself.
    Other ways to get memory, or to fill it, may leave anything in the adapters.

    Args:
        model: an adapted model, sharded or not; changed in place.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: the model has no BOFT layer.
    """
    checks.module("model", model)
    adapters = [module for module in model.modules() if isinstance(module, HasAdapter)]
    if not adapters:
        raise ValueError("model: expected at least one BOFT layer, got none")
    for adapter in adapters:
        adapter.reset_adapter()
    return model
