"""The common part of the accelerated forms of PEFT's BOFT and OFT layers. Needs PEFT.

Accelerating a layer changes its class only, to a subclass of PEFT's class whose forward, merge and
unmerge compute through this package's operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..._runtime import autocast, checks
from ...nn.base_modules import call_for_scale, check_numbers
from ...nn.distributed import Shards, averaged
from ...nn.powers import Powers, power
from ...ops.butterfly import butterfly_matmul
from ...ops.geodesic import inverse_cayley
from ...ops.linear import rotated_linear
from ...ops.merge import merge_rotations, merge_weight, unmerge_weight, untracked
from ...ops.rotation import Rotation, SkewRotation
from ...ops.scale import scale_columns
from .base import call_with_weight, is_unmodified, onloaded


class Rotated:
    """Mixin that precedes a tuner layer of PEFT among the bases of an accelerated form.

    Attributes:
        peft_class: PEFT's class, to which ``restore`` returns.
        strengths: t of R^t and s^t by the name of the adapter; 1 for names that are not in it.
        row_names: inside a call with ``adapter_names``, these and the rows of each (``rows.py``).
    """

    peft_class: type[nn.Module]
    strengths: Mapping[str, float] = MappingProxyType({})
    row_names: tuple[Sequence[str], int] | None = None
    _powers: Mapping[str, Powers] = MappingProxyType({})
    _shards: Shards | None = None

    def note_shards(self) -> None:
        """Note that the base is sharded already: nobody then averages gradients of adapters."""
        self._shards = Shards.of(self.get_base_layer())

    def of_all_ranks(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter of an adapter, whose gradient is averaged if the base was sharded before."""
        if self._shards is None:
            return parameter
        return averaged(parameter, self._shards.ranks_with_data(self.get_base_layer()))

    def _names(self) -> Sequence[str]:
        """The names of the adapters of this layer."""
        raise NotImplementedError

    def _adapter(self, name: str) -> Rotation:
        """The rotation of an adapter, without dropout."""
        raise NotImplementedError

    def _drop(self, name: str, adapter: Rotation) -> torch.Tensor | None:
        """The dropout mask of one forward pass, or None."""
        return None

    def _scale(self, name: str) -> torch.Tensor | None:
        """The scale (n,) of the outputs, or None."""
        return None

    def _sources(self, name: str) -> tuple[torch.Tensor, ...]:
        """The parameters that the rotation and the scale of an adapter are made from."""
        raise NotImplementedError

    def _nearest_first(self, names: Sequence[str]) -> Sequence[str]:
        """Sort adapters in the order in which the weight meets them; x meets the last first."""
        return names

    def _rotated(
        self,
        adapters: list[Rotation],
        scale: torch.Tensor | None,
        x: torch.Tensor,
        args: tuple,
        kwargs: dict,
    ) -> torch.Tensor:
        """The output of the base layer with rotated inputs or weight, scaled.

        ``adapters`` are in the order of ``_nearest_first``; ``args`` and ``kwargs`` are further
        arguments of the base layer.
        """
        raise NotImplementedError

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        dtype = x.dtype
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
        elif not self.merged_adapters:
            if self.row_names is not None:
                return self._by_rows(x, args, kwargs).to(dtype)
            return self._adapted(self.active_adapters, x, args, kwargs).to(dtype)
        elif self.row_names is not None:
            raise ValueError("adapter_names: expected unmerged adapters, got a merged layer")
        return self.base_layer(x, *args, **kwargs).to(dtype)

    def _adapted(
        self, names: Sequence[str], x: torch.Tensor, args: tuple, kwargs: dict
    ) -> torch.Tensor:
        """The output for x with those of the named adapters that the layer has."""
        own = self._names()
        names = [name for name in names if name in own]
        if not names:
            return self.base_layer(x, *args, **kwargs)
        adapters, scale = {}, None
        for name in names:  # the order in which PEFT draws its masks
            adapter, factor = self.at_strength(name)
            if self.training and isinstance(adapter, SkewRotation):
                adapter = adapter._replace(drop_mask=self._drop(name, adapter))
            adapters[name] = adapter
            scale = factor if scale is None else scale * factor
        nearest_first = [adapters[name] for name in self._nearest_first(names)]
        return self._rotated(nearest_first, scale, x, args, kwargs)

    def _by_rows(self, x: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        """The output for x whose rows have adapters of their own."""
        names, repeats = self.row_names
        if len(x) not in (len(names), repeats * len(names)):
            raise ValueError(
                f"adapter_names: expected a name for each of the {len(x)} inputs of a layer, got "
                f"{len(names)}"
            )
        if len(x) != len(names):  # beams of one request are neighbors
            names = [name for name in names for _ in range(repeats)]
        y = None
        for name in dict.fromkeys(names):
            rows = [i for i, other in enumerate(names) if other == name]
            part = self._adapted([name], x[rows], args, kwargs)
            y = part.new_empty(len(x), *part.shape[1:]) if y is None else y
            y[rows] = part
        return y

    def at_strength(self, name: str) -> tuple[Rotation, torch.Tensor | None]:
        """The rotation and the scale of an adapter at its strength; detached, unless that is 1."""
        strength, adapter = self.strengths.get(name, 1), self._adapter(name)
        scale = self._scale(name)
        if strength == 1:
            return adapter, scale
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"adapter {name!r}: expected scale 1 in training, or eval(), got {strength}"
            )
        offset = None if scale is None else scale.detach().double() - 1
        if isinstance(adapter, SkewRotation):
            skew, offset = self._powers[name].of(
                adapter.skew, offset, strength, self._sources(name)
            )
            return adapter._replace(skew=skew), _as_scale(offset, scale)
        if not adapter.is_orthogonal():
            raise ValueError(
                f"adapter {name!r}: expected scale 1 over blocks of a truncated series that is "
                f"none of this package's, got {strength}"
            )
        matrix = adapter.matrix
        skew, offset = power(inverse_cayley(matrix).to(matrix.dtype), offset, strength)
        return SkewRotation(skew[None]), _as_scale(offset, scale)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter, for inference: R^t and s^t in the place of R and s.

        PEFT's own layers ignore it with a warning.

        Args:
            adapter: its name; a layer without it is left as it is.
            scale: t; 0 is the base layer and 1 the adapter, both exactly.

        Raises:
            TypeError, ValueError: ``scale`` is no finite number.
            RuntimeError: the adapter is merged.
        """
        checks.finite("scale", scale)
        if adapter not in self._names():
            return
        if adapter in self.merged_adapters:
            raise RuntimeError(f"set_scale: expected an unmerged adapter, {adapter!r} is merged")
        self.strengths = {**self.strengths, adapter: float(scale)}
        self._powers = {**self._powers, adapter: Powers()}

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of each active adapter by ``scale``, see ``set_scale``."""
        checks.finite("scale", scale)
        for name in self.active_adapters:
            self.set_scale(name, scale * self.strengths.get(name, 1))

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of each active adapter by ``scale``; None sets it to 1."""
        for name in self.active_adapters:
            self.set_scale(name, 1 if scale is None else self.strengths.get(name, 1) / scale)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter as PEFT does, and its strength."""
        super().delete_adapter(adapter_name)
        self.strengths = {n: t for n, t in self.strengths.items() if n != adapter_name}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Multiply the base weight by the rotations and scales of adapters.

        Computed without d x d matrices, in at least float32, and rounded once for each adapter.

        Args:
            safe_merge: True checks for infinities and NaNs before the weight is changed.
            adapter_names: the adapters to merge; None merges the active ones.

        Raises:
            ValueError: ``safe_merge`` found an infinity or NaN.
        """
        own = self._names()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in own]
        if not names:
            return
        names, weight = self._nearest_first(names), self.get_base_weight()
        for name in names:
            weight = self._merge_one(weight, name)
            if safe_merge and not torch.isfinite(weight).all():
                # PEFT's words, which its tests and its users' programs look for.
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
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

    @untracked
    def _merge_one(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        adapter, scale = self.at_strength(name)
        return merge_weight(weight, adapter.blocks(), scale)

    @untracked
    def _unmerge_one(self, name: str) -> torch.Tensor:
        adapter, scale = self.at_strength(name)
        orthogonal = adapter.is_orthogonal()
        try:
            return unmerge_weight(
                self.get_base_weight(), adapter.blocks(), scale, orthogonal=orthogonal
            )
        except ValueError as error:
            raise ValueError(f"adapter {name!r}: {error}") from error

    def dense_rotation(self, name: str) -> torch.Tensor:
        """The matrix R, (d, d), for PEFT's ``get_delta_weight``."""
        blocks = self.at_strength(name)[0].blocks()
        eye = torch.eye(blocks.shape[-3] * blocks.shape[-1], dtype=blocks.dtype)
        return butterfly_matmul(eye.to(blocks.device), blocks)


class RotatedInput(Rotated):
    """Accelerated linear layers: the input is rotated, so the base may be any module."""

    def _rotated(self, adapters, scale, x, args, kwargs):
        nearest, *others = adapters
        for adapter in reversed(others):
            x = butterfly_matmul(x, adapter.blocks())
        base = self.base_layer
        with onloaded(base):
            check_numbers({"adapter": nearest[0], "scale": scale}, x)
            if not args and not kwargs and is_unmodified(base, nn.Linear, x):
                checks.linear_input(x, base.weight)
                return rotated_linear(x, base.weight, nearest, scale=scale, bias=base.bias)
            x = butterfly_matmul(x, nearest.blocks())
            if scale is None:
                return base(x, *args, **kwargs)
            check_numbers({"bias": getattr(base, "bias", None)}, x)
            y, center, bias = call_for_scale(base, scale, x, *args, **kwargs)
            return scale_columns(y, scale, center, bias)


class RotatedKernel(Rotated):
    """Accelerated convolutions: the kernel, as (out, in * kh * kw), is rotated once per call."""

    def _rotated(self, adapters, scale, x, args, kwargs):
        base = self.base_layer
        with onloaded(base):
            # Autocast is for products with activations, not for the rotation of a weight.
            with autocast.disabled(x.device.type):
                scales = [*[None] * (len(adapters) - 1), scale]
                blocks = [adapter.blocks() for adapter in adapters]
                weight = merge_rotations(base.weight, zip(blocks, scales, strict=True))
            return call_with_weight(base, nn.Conv2d, weight, x, args, kwargs)


def _as_scale(offset: torch.Tensor | None, like: torch.Tensor | None) -> torch.Tensor | None:
    """The scale of an offset from one, in the dtype of ``like``."""
    return None if offset is None else (offset + 1).to(like.dtype)
