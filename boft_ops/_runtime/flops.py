"""Flop formulas of the operators, for torch's FlopCounterMode.

The counter looks an operator up in a table of its module, ``torch.utils.flop_counter``. Importing
that module imports Triton, which takes longer than importing this package. The formulas are
therefore put there when someone else imports the module, or at once if that has happened.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}  # by the packet of an operator


def declare(op: Any, formula: Callable[..., int] | None) -> None:
    """Let the counter count an operator.

    Args:
        op: the operator, an ``OpOverload``.
        formula: the arguments of a call -> its floating-point operations. A multiplication and an
            addition count as two. None for an operator that works on single elements: torch
            counts none for these.
    """
    if formula is None:
        return
    _formulas[op.overloadpacket] = lambda *args, out_val=None: formula(*args)
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])


def _register(counter) -> None:
    for packet, formula in _formulas.items():
        if packet not in counter.flop_registry:
            counter.register_flop_formula(packet, get_raw=True)(formula)


class _OnImport:
    """A finder of ``sys.meta_path`` that registers the formulas as soon as the counter is there."""

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)  # the other finders find it
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _OnImport())
