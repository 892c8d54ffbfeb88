"""The strength of a rotation: R^t and s^t in the place of R and s, for inference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._runtime import checks
from ..ops.geodesic import geodesic

Pair = tuple[torch.Tensor, torch.Tensor | None]  # skew and scale


@torch.no_grad()
def power(skew: torch.Tensor, scale: torch.Tensor | None, strength: float) -> Pair:
    """Return the parameters of R^t and the scale s^t, in the dtypes of ``skew`` and ``scale``.

    Args:
        skew: (..., b(b-1)/2); every block becomes its t-th power, see ``geodesic``.
        scale: (n,) or None.
        strength: t, a finite number.

    Raises:
        ValueError: a scale is not positive, and so has no powers, unless t is 0 or 1.
    """
    if strength == 1:
        return skew, scale
    if scale is not None and strength != 0 and not (scale > 0).all():
        raise ValueError(
            f"strength: expected 0 or 1 over a scale that is not positive, got {strength}"
        )
    powered = scale if scale is None else scale.double().pow(strength).to(scale.dtype)
    return geodesic(skew, strength), powered


class Powers:
    """``power`` of parameters, computed again only once these have changed.

    A compiled graph takes what was computed before it, without looking whether it still holds.
    """

    def __init__(self) -> None:
        self._key: list | None = None
        self._pair: Pair | None = None

    def of(
        self,
        skew: torch.Tensor,
        scale: torch.Tensor | None,
        strength: float,
        sources: Sequence[torch.Tensor | None] = (),
    ) -> Pair:
        """``power(skew, scale, strength)``.

        Args:
            sources: the parameters that tell a change, if skew and scale are made from others.
        """
        if self._pair is not None and torch.compiler.is_compiling():
            return self._pair
        key: list = [strength]
        for tensor in sources or (skew, scale):
            if tensor is not None:
                # a change in place raises the version; a tensor made in inference mode has none
                version = 0 if tensor.is_inference() else tensor._version
                key += [id(tensor), version, tensor.device, tensor.dtype]
        if key != self._key:
            with torch.inference_mode(False):  # gradients of x may be wanted later
                self._pair, self._key = power(skew, scale, strength), key
        return self._pair


class HasStrength:
    """Mixin for modules with ``skew``, ``scale`` and ``merged``: their strength in inference.

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
        power(self.skew[:0], self.scale, strength)

    def set_strength(self, strength: float):
        """Weaken the adapter for inference: R^t and s^t in the place of R and s.

        At t = 0 the module is the pretrained one and at t = 1 the finetuned one, both exactly. In
        between every block of R follows the shortest way, by t times its angles. Numbers beyond 1
        exaggerate what was trained, and negative ones turn the other way. ``skew`` and ``scale``
        are not changed, and files hold them as they are. A trained bias has no strength.

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
        if strength != 1 and not self.skew.is_meta:
            # now, as a compiled graph would take apart what it traces
            self._powers.of(self.skew, self.scale, self.strength)
        return self

    def at_strength(self) -> Pair:
        """Return skew and scale, or at another strength than 1 what takes their place, detached.

        Raises:
            RuntimeError: skew or scale is to be trained at another strength than 1.
        """
        skew, scale = self.skew, self.scale
        if self.strength == 1:
            return skew, scale
        trained = skew.requires_grad or (scale is not None and scale.requires_grad)
        if self.training and torch.is_grad_enabled() and trained:
            raise RuntimeError(
                f"strength: expected 1 in training, or eval(), got {self.strength}: skew and scale "
                "would get no gradient"
            )
        return self._powers.of(skew, scale, self.strength)
