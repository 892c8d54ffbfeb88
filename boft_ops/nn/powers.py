"""The strength of a rotation: R^t and s^t in the place of R and s, for inference.

Scales come and go as their offsets from one, in which parameters hold them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from .._runtime import checks
from ..ops.geodesic import geodesic
from .changes import Source, is_watchable
from .distributed import by_parts, whole
from .rotated_weight import is_sharded

if TYPE_CHECKING:
    from typing_extensions import Self

Pair = tuple[torch.Tensor, torch.Tensor | None]  # skew and scale_offset


@torch.no_grad()
def power(skew: torch.Tensor, scale_offset: torch.Tensor | None, strength: float) -> Pair:
    """Return the parameters of R^t and s^t, in the dtypes of ``skew`` and ``scale_offset``.

    Args:
        skew: (..., b(b-1)/2); every block becomes its t-th power, see ``geodesic``. Each rank
            computes its part of a DTensor.
        scale_offset: s - 1, (..., n), or None.
        strength: t, a finite number.

    Raises:
        ValueError: a scale is not positive, and so has no powers, unless t is 0 or 1.
    """
    if strength == 1:
        return skew, scale_offset
    skew = by_parts(lambda part: geodesic(part, strength), skew)
    if scale_offset is None:
        return skew, None
    _check_positive(scale_offset.to_local() if is_sharded(scale_offset) else scale_offset, strength)
    # in float64 the ones leave enough digits of a small offset
    scale = scale_offset.double() + 1
    return skew, (scale.pow(strength) - 1).to(scale_offset.dtype)


def _check_positive(scale_offset: torch.Tensor | None, strength: float) -> None:
    """Raise ValueError for a scale without a t-th power; a placeholder is passed over.

    A graph cannot look at numbers: there the check of ``set_strength`` has to do.
    """
    if scale_offset is None or scale_offset.is_meta or torch.compiler.is_compiling():
        return
    if strength in (0, 1):
        return
    if not (scale_offset > -1).all():
        raise ValueError(
            f"strength: expected 0 or 1 over a scale that is not positive, got {strength}"
        )


class Powers:
    """``power`` of parameters, computed again only once these have changed.

    A compiled graph cannot compute again. It takes what was computed before it, and NaN in the
    place of that if the parameters hold other numbers by then.
    """

    def __init__(self) -> None:
        self._strength: float | None = None
        self._sources: tuple[Source, ...] = ()
        self._pair: Pair | None = None

    def of(
        self,
        skew: torch.Tensor,
        scale_offset: torch.Tensor | None,
        strength: float,
        sources: Sequence[torch.Tensor | None] = (),
    ) -> Pair:
        """``power(skew, scale_offset, strength)``.

        Args:
            sources: the parameters that tell a change, if the two are made from others.
        """
        sources = [tensor for tensor in sources or (skew, scale_offset) if tensor is not None]
        if torch.compiler.is_compiling():
            if self._pair is None:
                return power(skew, scale_offset, strength)
            return self._unless_changed(sources)
        if self._pair is not None and strength == self._strength and self._are_now(sources):
            return self._pair
        with torch.inference_mode(False):  # gradients of x may be wanted later
            pair = power(skew, scale_offset, strength)
            if all(map(is_watchable, sources)):
                self._sources = tuple(map(Source.of, sources))
                self._pair, self._strength = pair, strength
            else:
                self._pair = None
        return pair

    def _are_now(self, sources: list[torch.Tensor]) -> bool:
        return len(sources) == len(self._sources) and all(
            source.is_now(tensor) for source, tensor in zip(self._sources, sources, strict=True)
        )

    def _unless_changed(self, sources: list[torch.Tensor]) -> Pair:
        """The pair, or NaN if ``sources`` have other numbers than those that it was made from.

        Shards are not looked at: a rank with other numbers could not tell the others.
        """
        skew, offset = self._pair
        if any(map(is_sharded, sources)):
            return skew, offset
        fits = torch.ones((), dtype=torch.bool, device=skew.device)
        for source, tensor in zip(self._sources, sources, strict=True):
            fits = fits & (tensor.detach() == source.numbers).all()
        offset = None if offset is None else torch.where(fits, offset, math.nan)
        return torch.where(fits, skew, math.nan), offset


class HasStrength:
    """Mixin for modules with ``skew``, ``scale_offset``, ``merged``: their strength in inference.

    Attributes:
        strength: 1, unless ``set_strength`` changed it.
    """

    strength: float = 1.0
    _powers: Powers

    def check_strength(self, strength: float) -> None:
        """Raise unless ``set_strength`` would accept the number; nothing is changed."""
        checks.finite("strength", strength)
        if self.merged:
            raise RuntimeError("set_strength: expected an unmerged layer, got a merged one")
        offset = self.scale_offset
        if offset is not None and not offset.is_meta:  # all ranks find the same
            _check_positive(whole(offset), strength)

    def set_strength(self, strength: float) -> Self:
        """Weaken the adapter for inference: R^t and s^t in the place of R and s.

        At t = 0 the module is the pretrained one and at t = 1 the finetuned one, both exactly. In
        between every block of R follows the shortest way, by t times its angles. Numbers beyond 1
        exaggerate what was trained, and negative ones turn the other way. The parameters
        are not changed, and files hold them as they are. A trained bias has no strength.
        Every rank that holds a part of skew or scale makes the call.

        Args:
            strength: t, a finite number.

        Returns:
            The module itself.

        Raises:
            TypeError: t is no number.
            ValueError: t is not finite, or neither 0 nor 1 over a scale that is not positive.
            RuntimeError: the layer is merged.
        """
        self.check_strength(strength)
        self.strength, self._powers = float(strength), Powers()
        self.renew_powers()
        return self

    def renew_powers(self) -> None:
        """Compute now what ``at_strength`` returns, if it can be kept: see ``Powers``.

        A compiled graph would take apart the computation that it traces, and sees no change.
        """
        if self.strength == 1 or not is_watchable(self.skew):
            return
        with suppress(ValueError):  # scales without powers raise in the next call
            self._powers.of(self.skew, self.scale_offset, self.strength)

    def _apply(self, *args, **kwargs) -> Self:
        super()._apply(*args, **kwargs)
        self.renew_powers()
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.renew_powers()

    def at_strength(self) -> Pair:
        """Return skew and scale_offset, or at another strength than 1 what takes their place.

        The latter is detached. They are DTensors where the parameters are, with the same
        placements.

        Raises:
            RuntimeError: skew or scale_offset is to be trained at another strength than 1.
        """
        skew, offset = self.skew, self.scale_offset
        if self.strength == 1:
            return skew, offset
        trained = skew.requires_grad or (offset is not None and offset.requires_grad)
        if self.training and torch.is_grad_enabled() and trained:
            raise RuntimeError(
                f"strength: expected 1 in training, or eval(), got {self.strength}: skew and scale "
                "would get no gradient"
            )
        return self._powers.of(skew, offset, self.strength)
