"""Initial numbers of skew and scale, which make the identity."""

from __future__ import annotations

import torch
from torch import nn

from .config import HasRotation


class HasAdapter(HasRotation):
    """Mixin for modules that hold a ``skew`` and a ``scale``.

    A module that gets memory after it was built on the meta device starts as the identity:
    ``to_empty`` alone would leave whatever the memory held before, and no pretrained checkpoint
    brings numbers for an adapter.
    """

    skew: nn.Parameter

    def reset_adapter(self) -> None:
        """Make the adapter the identity: skew zero, scale one."""
        with torch.no_grad():
            self.skew.zero_()
            if self.scale is not None:
                self.scale.fill_(1)

    def _apply(self, fn, recurse=True):
        was_meta = self._is_meta()
        super()._apply(fn, recurse)
        if was_meta and not self._is_meta():
            self.reset_adapter()
        return self

    def _is_meta(self) -> bool:
        skew = self._parameters.get("skew")
        return skew is not None and skew.is_meta
