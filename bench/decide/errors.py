"""Section "errors": each kernel against float64, with fresh numbers and poisoned outputs."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from boft_ops._runtime import backend

from .contest import Part, Setting, reason, settle
from .kernels import Case, as_chosen, cases, choices
from .lines import Writer

ROUNDS = 2  # sets of numbers
UNITS = 2  # in the last place, that an error may exceed twice that of plain torch by
BLOCKS = 3  # poisoned pieces of memory for each output


def parts(setting: Setting, writer: Writer) -> Iterator[Part]:
    """Yield each call, by all backends and with all variants of its tile."""
    for case in cases(setting):
        yield case.part, partial(check, case, setting, writer)


def check(case: Case, setting: Setting, writer: Writer) -> None:
    """Write, for each choice, its largest error by round in parts of the allowed one."""
    seeds = [secrets.randbelow(1 << 31) for _ in range(ROUNDS)]
    parts_of_allowed: dict[str, dict[int, float]] = {}
    worst: dict[str, float] = {}
    poisoned: dict[str, int] = {}
    for round_, seed in enumerate(seeds):
        args = case.args(seed)
        with torch.no_grad(), backend.force("reference"):
            exact = _tensors(case.op.comparable(case.op(*map(_double, args))))
            plain = _errors(case.op.comparable(case.op(*args)), exact)
        units = UNITS * torch.finfo(_tensors(args)[0].dtype).eps
        allowed = [2 * error + units for error in plain]
        for variant in choices(case, args, setting.variants):
            name = variant.name
            if name == "reference" or (round_ and name not in worst):
                continue
            try:
                with as_chosen(case, variant.choice):
                    result, share = _on_poison(case, variant.args(args))
            except Exception as error:
                writer.write("failed", part=case.part, name=name, why=reason(error))
                settle(setting.device)
                continue
            errors = _errors(case.op.comparable(result), exact)
            parts = [error / most for error, most in zip(errors, allowed, strict=True)]
            # NaN is larger than any bound, but max() might overlook it
            largest = float("inf") if any(map(math.isnan, parts)) else max(parts)
            parts_of_allowed.setdefault(name, {})[round_] = largest
            worst[name] = max(worst.get(name, 0.0), *errors)
            poisoned[name] = share
    for name, by_round in parts_of_allowed.items():
        facts = case.facts | {"error": worst[name], "poisoned": poisoned[name], "seeds": seeds}
        writer.figure(case.part, name, name, by_round, unit="1", first=name, **facts)


def _on_poison(case: Case, args: tuple) -> tuple[Any, int]:
    """Call an operator whose outputs lie in memory full of NaN, where the allocator reuses it.

    Returns:
        The result, and the number of its tensors that do lie there.
    """
    first = _tensors(case.op(*args))
    blocks = [torch.full_like(t, float("nan")) for t in first for _ in range(BLOCKS)]
    blocks += [t.fill_(float("nan")) for t in first]
    addresses = {t.data_ptr() for t in blocks}
    del first, blocks
    result = case.op(*args)
    return result, sum(t.data_ptr() in addresses for t in _tensors(result))


def _errors(result: Any, exact: list[torch.Tensor]) -> list[float]:
    """Relative errors in the Frobenius norm."""
    pairs = zip(_tensors(result), exact, strict=True)
    return [float((a.double() - e).norm() / e.norm().clamp_min(1e-300)) for a, e in pairs]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    nested = value if isinstance(value, tuple | list) else ()
    return [tensor for part in nested for tensor in _tensors(part)]


def _double(value: Any) -> Any:
    is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_floating else value
