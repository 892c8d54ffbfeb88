"""The search: check, time, decide. One problem at a time, for the command and for first use."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any

import torch

from .._runtime import backend, tuned_file
from .._runtime.shape_class import CLASSES
from .._runtime.tuned import forget, pinned
from .._runtime.tuned_table import SAME, Choice, nearest, table_of
from .compile import compile_ahead
from .machine import Machine, data_sheet
from .measure import Timer, is_faster, sets_of, take_turns
from .problems import Problem

FIRST = 3  # calls of everyone
FINALISTS = 4  # beside the default
ROUNDS, MOST_ROUNDS, SECONDS = 15, 101, 0.5  # of the final; more rounds while they fit in SECONDS
MEMORY = 2 << 30  # bytes that the sets of inputs may take
UNITS = 2  # in the last place, that an error may exceed twice that of plain torch by


class DeviceError(RuntimeError):
    """The device reported an error that no later call survives."""


def tune(
    problem: Problem,
    machine: Machine,
    timer: Timer,
    backends: Sequence[str] | None = None,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """The row of the file for one problem: what is best, and what was found on the way."""
    with torch.no_grad():
        sets = sets_of(problem.make, MEMORY)
        default, *others = problem.candidates(sets[0], machine, backends)
        failed: list[dict[str, Any]] = []
        if problem.device.type == "cuda":
            tiles = [choice for choice in (default, *others) if choice.backend == "triton"]
            compile_ahead(problem, tiles, sets[0])
        right = _Checker(problem, sets[0])
        if (fault := right.fault(default)) is not None:
            raise RuntimeError(f"{problem}: the default itself fails: {fault}")
        able = [default]
        for choice in others:
            if (fault := right.fault(choice)) is None:
                able.append(choice)
            else:
                failed.append({"backend": choice.backend, "config": choice.config, "why": fault})
        del right

        def timed(choices: Sequence[Choice], count: int) -> list[list[float]]:
            return take_turns(timer, [_run_of(problem, c, sets) for c in choices], count)

        began = time.perf_counter()
        first = [median(times) for times in timed(able, FIRST)]
        call = (time.perf_counter() - began) / (FIRST * len(able))  # with the overwriting
        ranked = sorted(range(1, len(able)), key=lambda i: first[i])[:FINALISTS]
        finalists = [default, *(able[i] for i in ranked)]
        count = int(SECONDS / (call * len(finalists)))
        times = timed(finalists, max(rounds, min(MOST_ROUNDS, count)))
        faster = [i for i in range(1, len(finalists)) if is_faster(times[i], times[0])]
        best = min(faster, key=lambda i: median(times[i]), default=0)
        choice = finalists[best]
        if best:  # once more, alone with the default: of several the luckiest looks fastest
            times = timed([default, choice], len(times[0]))
            if is_faster(times[1], times[0]):
                best = 1
            else:
                best, choice = 0, default
    floor = machine.seconds(problem.n_bytes, problem.flops, problem.dtype or "float32")
    return {
        "op": problem.op,
        "dtype": problem.dtype,
        "structure": problem.structure,
        "sizes": problem.sizes,
        "backend": choice.backend,
        "config": choice.config,
        "us": _us(median(times[best])),
        "default_us": _us(median(times[0])),
        "floor_us": _us(floor),
        "tried": len(others) + 1,
        "failed": failed,
    }


def _run_of(problem: Problem, choice: Choice, sets: Sequence[tuple]) -> Callable[[int], object]:
    def run(round_: int) -> object:
        with problem.apply(choice):
            return problem.run(*sets[round_ % len(sets)])

    return run


def compare(
    problem: Problem, choice: Choice, timer: Timer, rounds: int = 41
) -> tuple[float, float, float]:
    """Quartiles, over the rounds, of a choice's time in parts of the default's."""
    with torch.no_grad():
        sets = sets_of(problem.make, MEMORY)
        both = problem.default(sets[0]), choice
        times = take_turns(timer, [_run_of(problem, c, sets) for c in both], rounds)
    ratios = [chosen / default for default, chosen in zip(*times, strict=True)]
    return tuple(quantiles(ratios, n=4, method="inclusive"))


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 2)


class _Checker:
    """Compares with float64 on the inputs of one set."""

    def __init__(self, problem: Problem, args: tuple) -> None:
        self.problem, self.args = problem, args
        with backend.force("reference"), pinned():
            self.exact = _tensors(problem.reduce(problem.run(*_map(_double, args))))
            plain = _tensors(problem.reduce(problem.run(*args)))
        self.allowed = [
            2 * _error(one, other) + UNITS * torch.finfo(one.dtype).eps
            for one, other in zip(plain, self.exact, strict=True)
        ]

    def fault(self, choice: Choice) -> str | None:
        """Why this choice may not be timed, if it may not."""
        try:
            with self.problem.apply(choice):
                result = _tensors(self.problem.reduce(self.problem.run(*self.args)))
            errors = [_error(a, b) for a, b in zip(result, self.exact, strict=True)]
        except Exception as error:  # a compiler's, a launch's, for want of memory or registers
            if _is_lost(error):
                raise DeviceError(f"{self.problem}: {choice}: {error}") from error
            return f"{type(error).__name__}: {str(error).strip().splitlines()[-1:] or ['']}"[:300]
        for i, (error, allowed) in enumerate(zip(errors, self.allowed, strict=True)):
            if not error <= allowed:  # NaN too
                return f"output {i}: relative error {error:.2g}, allowed {allowed:.2g}"
        return None


def _is_lost(error: Exception) -> bool:
    """Whether a GPU will answer every later call with this error: an illegal access, say."""
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    return any(sign in str(error) for sign in ("CUDA error", "HIP error", "illegal memory access"))


def _error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    difference = (actual.double() - exact).norm()
    return float(difference / exact.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _double(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_map(function, v) for v in value)
    return function(value)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)]


def on_first_use(op: backend.Op, args: tuple) -> None:
    """Tune the class of a call and keep it, unless another process did so while this one waited."""
    device = args[0].device
    path = tuned_file.user_file(device)
    problem = _problem_of(op, args)
    with tuned_file.locked(tuned_file.Path(f"{path}.tuning")):
        try:
            content = tuned_file.read(path, device)
        except ValueError:
            content = None
        key = op.name, problem.dtype, *problem.structure.values()
        known = table_of(content["choices"]) if content else {}
        if nearest(known, key, tuple(problem.sizes.values()), SAME) is None:
            machine = data_sheet(device)
            row = tune(problem, machine, Timer(device, machine))
            tuned_file.update(path, device, [row])
    forget()


def _problem_of(op: backend.Op, args: tuple) -> Problem:
    """The call itself: ops change none of their arguments."""
    classes = CLASSES[op.name]
    structure, sizes = classes.of(*args)
    return Problem(
        op.name,
        str(args[0].dtype).removeprefix("torch."),
        dict(zip(classes.structure, map(int, structure), strict=True)),
        dict(zip(classes.sizes, map(int, sizes), strict=True)),
        args[0].device,
        lambda seed: args,
        op,
        reduce=_SUMMED.get(op.name, lambda result: result),
    )


# whose partial sums are compared summed up: how they are divided is the kernel's affair
_SUMMED = {
    "gram": lambda partials: partials.sum(0),
    "rotate_backward": lambda result: (result[0], result[1].sum(0)),
}
