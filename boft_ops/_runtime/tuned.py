"""Measured choices: which backend, tile or plan was fastest on this machine (docs/tuning.md).

Whatever can be measured registers a ``Tunable``. A device has one table of choices. It is read at
the first call on the device, never at import. ``generation`` is the number of times that anything
here changed: whoever remembers a decision that rests on these choices compares it.
"""

from __future__ import annotations

import math
import operator
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch

from . import dtypes, internals, tuned_file
from .namespace import PACKAGE

NEAR = 4.0  # largest distance at which a measurement applies, in octaves summed over the sizes
MEMO = 4096  # look-ups that a table remembers: ever new batch sizes must not fill the memory


class ShapeClass(NamedTuple):
    """The class of a call: calls of one class share a measurement.

    Attributes:
        structure: names of the numbers that have to agree exactly.
        sizes: names of the numbers that are matched to the nearest measured ones.
        of: the arguments of a call -> (structure, sizes).
    """

    structure: tuple[str, ...]
    sizes: tuple[str, ...]
    of: Callable[..., tuple[tuple, tuple]]


class Choice(NamedTuple):
    """A backend ("" where there is only one), and the numbers to run it with.

    The numbers are (name, value) pairs: fields of a Triton kernel's tile, or of a plan.
    """

    backend: str
    config: tuple[tuple[str, int], ...] = ()


class Tunable(NamedTuple):
    """A decision that a measurement can change.

    Attributes:
        name: its name in the files.
        shape_class: the class of the call that it is made for.
        accepts: (device type, structure, Choice) -> None, or ValueError for an impossible choice.
    """

    name: str
    shape_class: ShapeClass
    accepts: Callable[[str, dict[str, int], Choice], None]


tunables: dict[str, Tunable] = {}
generation = 0


class _Table:
    """The choices of one device, with the look-ups made so far."""

    def __init__(self, rows: list[tuned_file.Row]) -> None:
        # (name, dtype, structure) -> the measured sizes, each with its choice
        self._classes: dict[tuple, list[tuple[tuple[int, ...], Choice]]] = {}
        for row in rows:
            key = row["op"], row["dtype"], tuple(row["structure"].values())
            choice = Choice(row["backend"], tuple(row["config"].items()))
            sizes = tuple(row["sizes"].values())
            self._classes.setdefault(key, []).append((sizes, choice))
        self.names = {row["op"] for row in rows}
        self._nearest = lru_cache(MEMO)(self._find)

    def lookup(self, name: str, dtype: str, structure: tuple, sizes: tuple) -> Choice | None:
        """The choice of the nearest class, the larger one of two equally near, or None."""
        known = tuple(size if type(size) is int else None for size in sizes)  # or symbolic
        return self._nearest(name, dtype, tuple(map(operator.index, structure)), known)

    def _find(self, name: str, dtype: str, structure: tuple, sizes: tuple) -> Choice | None:
        classes = self._classes.get((name, dtype, structure), ())
        near = [(_distance(sizes, at), [-size for size in at], choice) for at, choice in classes]
        distance, _, choice = min(near, default=(math.inf, None, None))
        return choice if distance <= NEAR else None


def _distance(sizes: tuple, measured: tuple) -> float:
    """Octaves between two tuples of sizes; an unknown size, None, is near to any."""
    pairs = zip(sizes, measured, strict=True)
    return sum(abs(math.log2(max(1, a) / max(1, b))) for a, b in pairs if a is not None)


# --- What this process knows ----------------------------------------------------------------------

CPU, OTHER = -1, -2  # device numbers beside those of GPUs, which torch counts from 0
DEVICE_TYPES = {CPU: "cpu", OTHER: ""}  # every other number is a GPU's
_NOTHING = _Table([])
_tables: dict[int, _Table] = {}
_pinned: dict[str, Choice] | None = None
_warned: set[str] = set()


def is_on() -> bool:
    """False if BOFT_OPS_AUTOTUNE=0 asks for the built-in defaults alone."""
    value = os.environ.get("BOFT_OPS_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"BOFT_OPS_AUTOTUNE: expected 0, 1 or nothing, got {value!r}")
    return value != "0"


is_on()  # validates the variable at import, as a call may never read a table


def register(tunable: Tunable) -> Tunable:
    """Register a decision that the tuner may measure."""
    tunables[tunable.name] = tunable
    return tunable


def device_number(x: torch.Tensor) -> int:
    """The number of the device of a tensor, by the shortest way."""
    return CPU if x.is_cpu else x.get_device() if x.is_cuda else OTHER


def table(number: int) -> _Table:
    """The choices of a device by its number; reads its file at the first call."""
    found = _tables.get(number)
    if found is None:
        found = _tables[number] = _read(number)
    return found


def number_of(device: torch.device) -> int:
    """The number of a device."""
    return {"cpu": CPU, "cuda": device.index or 0}.get(device.type, OTHER)


def _read(number: int) -> _Table:
    if not is_on() or number == OTHER:
        return _NOTHING
    device = torch.device("cpu") if number == CPU else torch.device("cuda", number)
    try:
        path = tuned_file.file_of(device)
    except RuntimeError:  # no home folder to have a cache in
        return _NOTHING
    try:
        return _Table(tuned_file.read(path, device, check_row))
    except ValueError as error:
        if str(path) not in _warned:
            _warned.add(str(path))
            message = f"{PACKAGE}: {path} is ignored: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return _NOTHING


def check_row(row: tuned_file.Row, device_type: str) -> None:
    """Raise ValueError for a row whose choice nothing here could follow."""
    tunable = tunables.get(row["op"])
    if tunable is None:
        raise ValueError(f"unknown operator {row['op']}")
    names = tunable.shape_class.structure + tunable.shape_class.sizes
    if (*row["structure"], *row["sizes"]) != names:
        raise ValueError(f"not a shape class of {row['op']}: {row}")
    choice = Choice(row["backend"], tuple(row["config"].items()))
    tunable.accepts(device_type, row["structure"], choice)


def forget() -> None:
    """Read the file of each device again, at the next call on it."""
    global generation
    _tables.clear()
    generation += 1


@contextmanager
def pinned(**choices: Choice) -> Iterator[None]:
    """Within the block these decisions are made so, and all others by default."""
    global _pinned, generation
    before, _pinned = _pinned, choices
    generation += 1
    try:
        yield
    finally:
        _pinned = before
        generation += 1


# --- Look-up --------------------------------------------------------------------------------------


def measured(tunable: Tunable, x: torch.Tensor, args: tuple, eager: bool = True) -> Choice | None:
    """The measured choice for a call, or None: the default serves it.

    Args:
        tunable: the decision.
        x: a tensor that has the device and dtype of the call.
        args: the arguments of ``tunable.shape_class.of``.
        eager: False while a graph is made. A choice is then a constant of that graph, which is
            made for any number of rows: it is looked up by the structure alone.
    """
    if not eager:
        structure = tuple(map(operator.index, tunable.shape_class.of(*args)[0]))
        return _in_graph(tunable.name, x.device.type, x.device.index, str(x.dtype), *structure)
    number = device_number(x)
    if not knows(tunable, number):
        return None
    return _find(tunable.name, number, x.dtype, *tunable.shape_class.of(*args))


def lookup(
    tunable: Tunable, device: torch.device, dtype: torch.dtype, structure: tuple, sizes: tuple
) -> Choice | None:
    """The measured choice for a class that is given by its numbers, or None."""
    return _find(tunable.name, number_of(device), dtype, structure, sizes)


def knows(tunable: Tunable, number: int) -> bool:
    """True if a look-up for some call on the device of this number may find a choice."""
    return _pinned is not None or tunable.name in table(number).names


@internals.constant_in_graphs
def _in_graph(
    name: str, device: str, index: int | None, dtype: str, *structure: int
) -> Choice | None:
    sizes = (None,) * len(tunables[name].shape_class.sizes)
    return _find(name, number_of(torch.device(device, index)), dtype, structure, sizes)


def _find(
    name: str, number: int, dtype: torch.dtype | str, structure: tuple, sizes: tuple
) -> Choice | None:
    if _pinned is not None:
        return _pinned.get(name)
    return table(number).lookup(name, dtypes.name_of(dtype), structure, sizes)
