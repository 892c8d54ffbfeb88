"""The search of one problem: check every candidate, time them in turn, decide."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import torch

from .._runtime import backend
from .._runtime.tuned import Choice, pinned
from .measure import Timer, is_faster, take_turns
from .workloads import Problem

FIRST = 3  # calls of every candidate
FINALISTS = 4  # beside the default
ROUNDS = 21  # calls of every finalist
SETS = 4  # most sets of inputs
MEMORY = 2 << 30  # bytes that the sets of inputs may take
UNITS = 2  # in the last place, that an error may exceed twice that of plain torch by


def tune(problem: Problem, timer: Timer, rounds: int = ROUNDS) -> dict[str, Any]:
    """The row of the file for one problem: the fastest choice, and what was seen on the way.

    Raises:
        RuntimeError: the default itself gives wrong numbers or an error.
    """
    with torch.no_grad():
        sets = _sets_of(problem)
        if problem.workload.device.type == "cuda" and backend.has_triton():
            _compile_ahead(problem, sets[0])
        checker = _Checker(problem, sets[0])
        if (fault := checker.fault(problem.default)) is not None:
            raise RuntimeError(f"{problem}: the default itself fails: {fault}")
        able, failed = [problem.default], []
        for choice in problem.others:
            if (fault := checker.fault(choice)) is None:
                able.append(choice)
            else:
                failed.append(choice._asdict() | {"config": dict(choice.config), "why": fault})
        del checker

        def timed(choices: Sequence[Choice], rounds: int) -> list[list[float]]:
            runs = [lambda i, c=c: problem.run_with(c, sets[i % len(sets)]) for c in choices]
            return take_turns(timer, runs, rounds)

        first = [median(times) for times in timed(able, FIRST)]
        ranked = sorted(range(1, len(able)), key=lambda i: first[i])[:FINALISTS]
        finalists = [problem.default, *(able[i] for i in ranked)]
        times = timed(finalists, rounds)
        faster = [i for i in range(1, len(finalists)) if is_faster(times[i], times[0])]
        best = min(faster, key=lambda i: median(times[i]), default=0)
        finalists = [problem.default, finalists[best]]
        if best:  # once more, alone with the default: of several the luckiest looks fastest
            times = timed(finalists, rounds)
            best = int(is_faster(times[1], times[0]))
    return problem.row(
        finalists[best],
        us=round(1e6 * median(times[best]), 2),
        default_us=round(1e6 * median(times[0]), 2),
        tried=1 + len(problem.others),
        failed=failed,
    )


def _sets_of(problem: Problem) -> list[tuple]:
    """Several sets of arguments, as far as MEMORY holds them; one at least."""
    sets = [problem.args(0)]
    n_bytes = sum(t.nbytes for t in sets[0] if isinstance(t, torch.Tensor))
    while len(sets) < SETS and (len(sets) + 1) * n_bytes <= MEMORY:
        sets.append(problem.args(len(sets)))
    return sets


class _Checker:
    """Compares a choice with float64, on one set of arguments."""

    def __init__(self, problem: Problem, args: tuple) -> None:
        self.problem, self.args = problem, args
        with backend.force("reference"), pinned():
            wide = [in_float64(value) for value in args]
            self.exact = tensors_of(problem.comparable(problem.run(*wide)))
            plain = tensors_of(problem.comparable(problem.run(*args)))
        self.allowed = [
            2 * error + UNITS * torch.finfo(tensor.dtype).eps
            for error, tensor in zip(relative_errors(plain, self.exact), plain, strict=True)
        ]

    def fault(self, choice: Choice) -> str | None:
        """The reason why this choice may not be timed, or None."""
        try:
            result = self.problem.comparable(self.problem.run_with(choice, self.args))
            errors = relative_errors(result, self.exact)
        except Exception as error:  # a compiler's, a launch's, for want of memory or registers
            return f"{type(error).__name__}: {str(error).strip().splitlines()[-1:] or ['']}"[:300]
        for i, (error, allowed) in enumerate(zip(errors, self.allowed, strict=True)):
            if not error <= allowed:  # NaN too
                return f"output {i}: relative error {error:.2g}, allowed {allowed:.2g}"
        return None


def relative_errors(result: Any, exact: Sequence[torch.Tensor]) -> list[float]:
    """The errors of the tensors of a result against float64, in the Frobenius norm."""
    least, pairs = torch.finfo(torch.float64).tiny, zip(tensors_of(result), exact, strict=True)
    return [float((a.double() - e).norm() / e.norm().clamp_min(least)) for a, e in pairs]


def in_float64(value: Any) -> Any:
    """A floating-point tensor in float64; other arguments unchanged."""
    is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_floating else value


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors among arguments or results, in their order."""
    if isinstance(value, torch.Tensor):
        return [value]
    nested = value if isinstance(value, tuple | list) else ()
    return [tensor for part in nested for tensor in tensors_of(part)]


def _compile_ahead(problem: Problem, args: tuple) -> None:
    """Compile the Triton candidates on all cores: on a GPU that is most of the time of tuning.

    A candidate that fails to compile fails again, with its error, when it is checked.
    """
    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = warm_up
    try:
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            AsyncCompileMode(pool, ignore_errors=True),
        ):
            for choice in (problem.default, *problem.others):
                if choice.backend == "triton":
                    with contextlib.suppress(Exception):
                        problem.run_with(choice, args)
    finally:
        JITFunction.run = launch
