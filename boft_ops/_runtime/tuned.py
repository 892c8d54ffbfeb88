"""Look-up of what was measured on this machine (docs/tuning.md).

The one place where measurements override built-in defaults. Nothing is read at import: a device's
files are, at the first call on it.
"""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.compiler import is_compiling

from . import native
from .namespace import PACKAGE
from .shape_class import BACKWARD_OF, CLASSES, Classes
from .tuned_file import read, shipped_file, user_file
from .tuned_table import SAME, Choice, Table, nearest, table_of

if TYPE_CHECKING:
    from .backend import Op

# look-ups of an operator that are remembered: batches of ever new sizes must not fill the memory
MEMO = 4096


# --- What this process has read -------------------------------------------------------------------

# numbers of devices: GPUs are counted from 0, as by Tensor.get_device; of others nothing is known
CPU, OTHER = -1, -2

_tables: dict[int, list[Table]] = {}  # the user's before the package's
# Of each device, the operators that the tables know, with the look-ups made so far. Whatever is not
# there has no measurement: a call finds that out with two look-ups by an integer and a string.
_memos: dict[int, dict[str, dict[tuple, Choice | None]]] = {}
_pinned: dict[str, Choice] | None = None
_warned: set[str] = set()
_seen: set[tuple] = set()  # by BOFT_OPS_AUTOTUNE=1, in this process
on_change: list[Callable[[], None]] = []  # what forgets decisions that were made by the above


def mode() -> str:
    """BOFT_OPS_AUTOTUNE: "" (use what was measured), "1" (and measure what was not) or "0"."""
    value = os.environ.get("BOFT_OPS_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"BOFT_OPS_AUTOTUNE: expected 0, 1 or nothing, got {value!r}")
    return value


_on_first_use = mode() == "1"  # read at import, as a call need not come to where a table is read


def tables(device: torch.device) -> list[Table]:
    number = _number(device)
    if number not in _tables:
        found = _tables[number] = _load(device)
        _memos[number] = {op: {} for table in found for op, *_ in table}
    return _tables[number]


def is_measured(device: torch.device) -> bool:
    """Return True if a table has any measurement for the device."""
    tables(device)
    return bool(_memos[_number(device)])


def _number(device: torch.device) -> int:
    return {"cpu": CPU, "cuda": device.index}.get(device.type, OTHER)


def _load(device: torch.device) -> list[Table]:
    if mode() == "0" or device.type not in ("cpu", "cuda"):
        return []
    found: list[Table] = []
    for file in (shipped_file, user_file):  # the user's numbers of the kernels are set last
        try:
            path = file(device)
        except RuntimeError:  # no home folder to have a cache in
            continue
        try:
            content = read(path, device)
            if content is not None:
                table = table_of(content["choices"])
                if device.type == "cpu":
                    native.set_tunables(_numbers(table))
                found.insert(0, table)
        except ValueError as error:
            if str(path) not in _warned:
                _warned.add(str(path))
                message = f"{PACKAGE}: {path} is ignored: {error}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
    return found


def _numbers(table: Table) -> dict[str, int]:
    """What it has for the C++ kernels of the whole process."""
    choices = [choice for op in ("grain", "blocking") for choice in table.get((op, ""), ())]
    return {name: value for choice in choices for name, value in choice.config.items()}


def measures_on_first_use() -> bool:
    """Whether a call may have something to measure, BOFT_OPS_AUTOTUNE=1: nothing is decided yet."""
    return _on_first_use


def forget() -> None:
    """Read the files again, at the next call on each device."""
    _tables.clear()
    _memos.clear()
    _changed()


def _changed() -> None:
    for forget_decisions in on_change:
        forget_decisions()


@contextmanager
def pinned(**choices: Choice) -> Iterator[None]:
    """Within the block these ops have these choices, every other the default. In eager mode."""
    global _pinned
    before, _pinned = _pinned, choices
    _changed()
    try:
        yield
    finally:
        _pinned = before
        _changed()


# --- Look-up --------------------------------------------------------------------------------------


def lookup(
    op: str, device: torch.device, dtype: torch.dtype, structure: tuple, sizes: tuple
) -> Choice | None:
    """What was measured for such a call, or None: the default serves it."""
    if _pinned is not None:
        return _pinned.get(op)
    tables(device)
    number = _number(device)
    return _remembered(number, op, dtype, (structure, sizes)) if op in _memos[number] else None


def _choice(op: str, x: torch.Tensor, args: tuple) -> Choice | None:
    """``lookup`` for a call of this class, made of ``args`` only where something is known."""
    if _pinned is not None:
        return _pinned.get(op)
    number = CPU if x.is_cpu else x.get_device() if x.is_cuda else OTHER
    known = _memos.get(number)
    if known is None:
        tables(x.device)
        known = _memos[number]
    if op not in known:
        return None
    return _remembered(number, op, x.dtype, CLASSES[op].of(*args))


def _remembered(number: int, op: str, dtype: torch.dtype, class_: tuple) -> Choice | None:
    memo, key = _memos[number][op], (dtype, class_)
    try:
        return memo[key]
    except KeyError:
        pass
    except TypeError:  # symbolic sizes cannot be hashed
        key = None
    structure, sizes = class_
    exact = (op, str(dtype).removeprefix("torch."), *map(operator.index, structure))
    known = tuple(size if type(size) is int else None for size in sizes)
    choices = (nearest(table, exact, known) for table in _tables[number])
    choice = next((choice for choice in choices if choice is not None), None)
    if key is not None:
        if len(memo) >= MEMO:
            memo.clear()
        memo[key] = choice
    return choice


def backend(op: Op, args: tuple, measure: bool = True, eager: bool = True) -> str | None:
    """The backend that was measured to be best for a call of an operator, if it was.

    ``measure``: whether BOFT_OPS_AUTOTUNE=1 may measure it now. ``eager``: not in a graph that is
    being made.
    """
    if not eager:
        classes, x = CLASSES.get(op.name), args[0]
        if classes is None:
            return None
        structure = tuple(map(operator.index, classes.of(*args)[0]))
        place = x.device.type, x.device.index, str(x.dtype)
        return _backend_in_graph(op.name, *place, *structure)
    if _on_first_use and measure and _pinned is None and op.name in CLASSES:
        _measure_unknown(op, args, CLASSES[op.name])
    if op.name in BACKWARD_OF:
        choice = _choice(BACKWARD_OF[op.name], args[1], args[1:])
    else:
        choice = _choice(op.name, args[0], args)
    return None if choice is None else choice.backend


def _measure_unknown(op: Op, args: tuple, classes: Classes) -> None:
    """BOFT_OPS_AUTOTUNE=1: measure the class of a call, unless one near it is known."""
    device, dtype = args[0].device, args[0].dtype
    structure, sizes = classes.of(*args)
    plain = all(type(size) is int for size in (*structure, *sizes)) and 0 not in sizes
    whole = op.name == "rotated_linear"  # others can stand for it
    if not plain or whole or (device.type == "cuda" and _is_capturing()):
        return
    key = op.name, device, dtype, structure, sizes
    if key not in _seen:
        _seen.add(key)
        exact = op.name, str(dtype).removeprefix("torch."), *structure
        if all(nearest(table, exact, sizes, SAME) is None for table in tables(device)):
            from ..tune.search import on_first_use

            on_first_use(op, args)


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def plan(
    x: torch.Tensor, n_factors: int, block_size: int, outputs: int | None
) -> tuple[int | None, bool | None]:
    """The measured number of stages for rows x (..., d), and whether W (outputs, d) goes through
    them in the place of x; None: not measured.

    Where the rows or the outputs are not known, a measurement in favour of W says nothing.
    """
    args = x, n_factors, block_size, outputs
    if is_compiling():
        place = x.device.type, x.device.index, str(x.dtype)
        sizes = operator.index(x.shape[-1]), None if outputs is None else operator.index(outputs)
        return _plan_in_graph(*place, *sizes, n_factors, block_size)
    choice = _choice("plan", x, args)
    return (None, None) if choice is None else _sides(choice, outputs is not None)


def _sides(choice: Choice, known: bool) -> tuple[int | None, bool | None]:
    weight_side = bool(choice.config.get("weight_side"))
    return (None, None) if weight_side and not known else (choice.config.get("stages"), weight_side)


def tile(
    op: str, device: int, dtype: torch.dtype, structure: tuple, sizes: tuple
) -> dict[str, int] | None:
    """The measured fields of a Triton kernel's config, for a launch on the device of this number.

    The kernels ask for them once for every kind of call, and again when ``on_change`` was called.
    """
    place = torch.device("cpu") if device == CPU else torch.device("cuda", device)
    choice = lookup(op, place, dtype, structure, sizes)
    return None if choice is None or choice.backend != "triton" else choice.config or None


def _backend_in_graph(op: str, device: str, index: int | None, dtype: str, *structure: int):
    sizes = (None,) * len(CLASSES[op].sizes)
    choice = lookup(op, torch.device(device, index), _dtype(dtype), structure, sizes)
    return None if choice is None else choice.backend


def _plan_in_graph(
    device: str, index: int | None, dtype: str, features: int, outputs: int | None, *structure: int
):
    place = torch.device(device, index), _dtype(dtype)
    choice = lookup("plan", *place, structure, (None, features, outputs))
    return (None, None) if choice is None else _sides(choice, known=False)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name.removeprefix("torch."))


# A choice is a constant of a compiled graph, made for its structure and any number of rows. This is
# what torch.compiler.assume_constant_result sets, which would import torch._dynamo here.
_backend_in_graph._dynamo_marked_constant = True
_plan_in_graph._dynamo_marked_constant = True
