"""Section "errors": each kernel against float64, with fresh numbers and poisoned outputs."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from boft_ops._runtime import backend
from boft_ops.tune.search import UNITS, in_float64, relative_errors, tensors_of

from .contest import Part, Setting, reason, settle
from .kernels import Case, as_chosen, cases, choices
from .lines import Writer

ROUNDS = 2  # sets of numbers
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
            exact = tensors_of(case.op.comparable(case.op(*map(in_float64, args))))
            plain = relative_errors(case.op.comparable(case.op(*args)), exact)
        units = UNITS * torch.finfo(tensors_of(args)[0].dtype).eps
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
            errors = relative_errors(case.op.comparable(result), exact)
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
    first = tensors_of(case.op(*args))
    blocks = [torch.full_like(t, float("nan")) for t in first for _ in range(BLOCKS)]
    blocks += [t.fill_(float("nan")) for t in first]
    addresses = {t.data_ptr() for t in blocks}
    del first, blocks
    result = case.op(*args)
    return result, sum(t.data_ptr() in addresses for t in tensors_of(result))
