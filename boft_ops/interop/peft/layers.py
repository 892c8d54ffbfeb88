"""What the accelerated forms of PEFT's BOFT and OFT layers share. Needs PEFT.

A layer keeps all that it is and has; only its class changes, to a subclass of PEFT's own whose
forward, merge and unmerge compute through this package's operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..._runtime import autocast, linalg
from ...nn.base import _exactly
from ...ops.butterfly import butterfly_matmul
from ...ops.linear import rotated_linear
from ...ops.rotation import Rotation, SkewRotation
from ...ops.scale import scale_columns
from .base import call_with_weight, is_plain


class Rotated:
    """Mixin before a tuner layer of PEFT.

    Attributes:
        peft_class: the class that ``restore`` gives back.
    """

    peft_class: type[nn.Module]

    def _names(self) -> Sequence[str]:
        """The adapters that this layer has."""
        raise NotImplementedError

    def _adapter(self, name: str) -> Rotation:
        """The rotation of an adapter, without dropout."""
        raise NotImplementedError

    def _drop(self, name: str, adapter: Rotation) -> torch.Tensor | None:
        """The mask of dropout of this forward pass."""
        return None

    def _scale(self, name: str) -> torch.Tensor | None:
        """The scale (n,) of the outputs."""
        return None

    def _nearest_first(self, names: Sequence[str]) -> Sequence[str]:
        """Active adapters in the order in which the weight meets them, x the last one first."""
        return names

    def _rotated(
        self,
        adapters: list[Rotation],
        scale: torch.Tensor | None,
        x: torch.Tensor,
        args: tuple,
        kwargs: dict,
    ) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        dtype = x.dtype
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
        elif not self.merged_adapters:
            own = self._names()
            if names := [name for name in self.active_adapters if name in own]:
                adapters, scale = {}, None
                for name in names:  # in this order PEFT draws its masks
                    adapter = self._adapter(name)
                    if self.training and isinstance(adapter, SkewRotation):
                        adapter = adapter._replace(drop_mask=self._drop(name, adapter))
                    adapters[name] = adapter
                    one = self._scale(name)
                    scale = one if scale is None else scale * one
                nearest_first = [adapters[name] for name in self._nearest_first(names)]
                return self._rotated(nearest_first, scale, x, args, kwargs).to(dtype)
        return self.base_layer(x, *args, **kwargs).to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Multiply the base weight by the rotations and scales of adapters, without their
        d x d matrices, in at least float32 and rounded once for each adapter.

        Args:
            safe_merge: look for infinities and NaNs before the weight is changed.
            adapter_names: which adapters; None is the active ones.

        Raises:
            ValueError: ``safe_merge`` found some.
        """
        own = self._names()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in own]
        if not names:
            return
        names, weight = self._nearest_first(names), self.get_base_weight()
        for name in names:
            weight = self._merge_one(weight, name)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(
                    f"NaNs detected in the merged weights: adapter {name!r} seems to be broken"
                )
        self.set_base_weight(weight)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Undo ``merge``, up to the rounding of the weight's dtype.

        Raises:
            ValueError: a scale holds a zero, which no division undoes.
        """
        if not self.merged_adapters:
            return super().unmerge()  # PEFT's warning
        own = self._names()
        while self.merged_adapters:
            name = self.merged_adapters[-1]
            if name in own:
                self.set_base_weight(self._unmerge_one(name))
            self.merged_adapters.pop()

    @_exactly
    def _merge_one(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        return rotated_weight(weight, [self._adapter(name)], self._scale(name))

    @_exactly
    def _unmerge_one(self, name: str) -> torch.Tensor:
        weight, scale = self.get_base_weight(), self._scale(name)
        matrix = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
        if scale is not None:
            if (scale == 0).any():
                raise ValueError(
                    f"the scale of adapter {name!r}: expected no zero in order to unmerge, got some"
                )
            matrix = matrix / scale[:, None].to(matrix.dtype)
        adapter = self._adapter(name)
        blocks = adapter.blocks().to(matrix.dtype)
        if not adapter.is_orthogonal():  # the inverse is not the transpose
            blocks = linalg.inverse(blocks).mT
        return butterfly_matmul(matrix, blocks).to(weight.dtype).reshape(weight.shape)

    def _dense_rotation(self, name: str) -> torch.Tensor:
        """R, (d, d): for PEFT's ``get_delta_weight``, which nothing here calls."""
        blocks = self._adapter(name).blocks()
        eye = torch.eye(blocks.shape[-3] * blocks.shape[-1], dtype=blocks.dtype)
        return butterfly_matmul(eye.to(blocks.device), blocks)


class RotatedInput(Rotated):
    """A linear layer: its input is rotated, so that the base may be anything with a forward."""

    def _rotated(self, adapters, scale, x, args, kwargs):
        nearest, *others = adapters
        for adapter in reversed(others):
            x = butterfly_matmul(x, adapter.blocks())
        base = self.base_layer
        if not args and not kwargs and is_plain(base, nn.Linear, x):
            return rotated_linear(x, base.weight, nearest, scale=scale, bias=base.bias)
        y = base(butterfly_matmul(x, nearest.blocks()), *args, **kwargs)
        if scale is None:
            return y
        bias = getattr(base, "bias", None)
        return scale_columns(y, scale, bias, bias)


class RotatedKernel(Rotated):
    """A convolution: its kernel, as (out, in * kh * kw), is rotated once for each call."""

    def _rotated(self, adapters, scale, x, args, kwargs):
        base = self.base_layer
        with autocast.disabled(x.device.type):  # it casts what is multiplied by activations
            weight = rotated_weight(base.weight, adapters, scale)
        return call_with_weight(base, nn.Conv2d, weight, x, args, kwargs)


def rotated_weight(
    weight: torch.Tensor, adapters: list[Rotation], scale: torch.Tensor | None
) -> torch.Tensor:
    """diag(scale) W R_1^T R_2^T ... of W seen as (n, d), in at least float32 and rounded once."""
    matrix = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    for adapter in adapters:
        matrix = butterfly_matmul(matrix, adapter.blocks(), transpose=True)
    if scale is not None:
        matrix = matrix * scale[:, None].to(matrix.dtype)
    return matrix.to(weight.dtype).reshape(weight.shape)
