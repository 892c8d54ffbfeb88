"""The options of a rotation: their defaults, their checks, and their form in adapter files."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields

from .._runtime import checks

Options = dict[str, int | float | str | bool]

# Not in every file: an option that is written only if it is not the default, and that of experts.
_OPTIONAL = frozenset({"kaleidoscope", "experts"})


@dataclass(frozen=True)
class RotationConfig:
    """The options of a rotation, its output scale and its dropout (arXiv 2311.06243, section 4).

    Integer options accept any integer type, such as numpy's, and are stored as ``int``.

    Attributes:
        block_size: b; must divide the rotated features, and be even if n_factors > 1.
        n_factors: m butterfly factors; the number of blocks must be a multiple of 2**(m-1).
        side: "in" rotates the inputs of the layer, "out" its outputs.
        scale: True if the layer trains a factor for each output.
        p_component, p_block: shares of ``multiplicative_dropout``, in [0, 1].
        method: "exact" or "neumann5", see ``cayley``.
        kaleidoscope: number of levels l, see ``kaleidoscope_matmul``; 0 is a single butterfly.

    Raises:
        TypeError, ValueError: an option is not valid for any layer.
    """

    block_size: int = 8
    n_factors: int = 2
    side: str = "in"
    scale: bool = True
    p_component: float = 0.0
    p_block: float = 0.0
    method: str = "exact"
    kaleidoscope: int = 0

    def __post_init__(self) -> None:
        checks.choice("side", self.side, checks.SIDES)
        checks.choice("method", self.method, checks.METHODS)
        if not isinstance(self.scale, bool):
            raise TypeError(f"scale: expected a bool, got {self.scale!r}")
        for name in ("block_size", "n_factors", "kaleidoscope"):
            object.__setattr__(self, name, _as_int(getattr(self, name)))
        checks.positive_int("block_size", self.block_size)
        checks.positive_int("n_factors", self.n_factors)
        checks.kaleidoscope("kaleidoscope", self.kaleidoscope, self.n_factors)
        checks.probability("p_component", self.p_component)
        checks.probability("p_block", self.p_block)

    def check_features(self, features: int) -> None:
        """Raise ValueError, with the nearest valid choices, if no such butterfly exists."""
        checks.butterfly_shape(features, self.block_size, self.n_factors)

    def skew_shape(self, features: int) -> tuple[int, int, int]:
        """The shape (m, K, b(b-1)/2) of ``skew``; 2 l m factors with kaleidoscope = l."""
        n_factors = (2 * self.kaleidoscope or 1) * self.n_factors
        return n_factors, features // self.block_size, checks.packed_size(self.block_size)

    def options(self) -> Options:
        """The keyword arguments of ``BOFTLinear`` for this config, as adapter files store them."""
        options = asdict(self)
        return {k: v for k, v in options.items() if k not in _OPTIONAL or v}

    @classmethod
    def mismatch(cls, names: Collection[str]) -> list[str]:
        """The names that are no options, and the options that are missing, sorted."""
        known = {field.name for field in fields(cls)}
        return sorted((set(names) ^ known) - _OPTIONAL)


def _as_int(value: object) -> object:
    """An ``int`` for an integer of any type; other values unchanged, for the checks to refuse."""
    if isinstance(value, bool):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value
