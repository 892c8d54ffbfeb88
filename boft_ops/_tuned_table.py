"""What was measured, as a table to look up the nearest shape class in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from ._shape_class import CLASSES
from ._tuned_file import Row

NEAR = 4.0  # octaves, summed over the sizes, beyond which a class says nothing
SAME = 1.0  # within which BOFT_OPS_AUTOTUNE=1 measures no more


class Choice(NamedTuple):
    """What was found best for a shape class: a backend, and numbers that its kernels take."""

    sizes: tuple[int, ...]
    backend: str
    config: dict[str, int]

    @property
    def tile(self) -> tuple[tuple[str, int], ...]:
        """Fields of a Triton kernel's config, as its launcher takes them; empty for others."""
        return tuple(self.config.items()) if self.backend == "triton" else ()


Table = dict[tuple, list[Choice]]  # (op, dtype, *structure) -> classes


def table_of(rows: Iterable[Row]) -> Table:
    """What is looked up in, from the rows of a file."""
    table: Table = {}
    for row in rows:
        names = CLASSES[row["op"]]
        key = row["op"], row["dtype"], *(row["structure"][name] for name in names.structure)
        sizes = tuple(row["sizes"][name] for name in names.sizes)
        table.setdefault(key, []).append(Choice(sizes, row["backend"], row["config"]))
    return table


def nearest(table: Table, key: tuple, sizes: tuple, within: float = NEAR) -> Choice | None:
    """The nearest class; of equally near ones the largest."""
    best = min(
        table.get(key, ()),
        key=lambda c: (distance(sizes, c.sizes), [-size for size in c.sizes]),
        default=None,
    )
    return best if best is not None and distance(sizes, best.sizes) <= within else None


def distance(sizes: tuple, other: tuple) -> float:
    """Octaves between two sizes; None, a size that is not known, is near to any."""
    pairs = zip(sizes, other, strict=True)
    return sum(abs(math.log2(max(1, a) / max(1, b))) for a, b in pairs if a is not None)
