"""The problems of linear layers: every operator that they call, and the plan of a whole layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._runtime import backend, checks, dtypes, tuned
from .._runtime.tuned import Choice, Tunable
from .._runtime.workload import Workload
from ..ops.linear import boft_linear
from ..ops.planner import PLAN, plan_choice, rotates_weight
from ..ops.stages import plan
from .candidates import tiles

MOST_FEATURES = 256  # of a group, in plans that are tried: no kernel takes more

# (inputs, outputs) of each kind of adapted linear layer
MODELS = {
    "llama-2-7b": ((4096, 4096), (4096, 11008), (11008, 4096)),
    "llama-3-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
    "deberta-v3-base": ((768, 768), (768, 3072), (3072, 768)),
    "dinov2-large": ((1024, 1024), (1024, 4096), (4096, 1024)),
    "sd-1.5": ((320, 320), (640, 640), (1280, 1280), (768, 320), (768, 640), (768, 1280)),
}


class Shape(NamedTuple):
    """A linear layer of d inputs and n outputs, and how many rows go through it."""

    d: int
    n: int
    rows: int


@dataclass(frozen=True)
class Problem:
    """One decision to be measured.

    Attributes:
        tunable: the decision.
        workload: the layer that it is made for.
        args: the arguments of one call, by the seed of the workload.
        run: the call.
        comparable: its result -> tensors that do not depend on the choice but for rounding.
        default: the choice where nothing was measured.
        others: further choices to try.
    """

    tunable: Tunable
    workload: Workload
    args: Callable[[int], tuple]
    run: Callable[..., Any]
    comparable: Callable[[Any], Any]
    default: Choice
    others: tuple[Choice, ...]
    structure: dict[str, int]
    sizes: dict[str, int]

    def __str__(self) -> str:
        numbers = [f"{k}={v}" for k, v in {**self.structure, **self.sizes}.items()]
        return " ".join([self.tunable.name, *numbers, dtypes.name_of(self.workload.dtype)])

    def row(self, choice: Choice, **seen: Any) -> dict[str, Any]:
        """The row of a file that keeps a choice."""
        return {
            "op": self.tunable.name,
            "dtype": self.dtype,
            "structure": self.structure,
            "sizes": self.sizes,
            "backend": choice.backend,
            "config": dict(choice.config),
            **seen,
        }

    @property
    def dtype(self) -> str:
        """The dtype of the first argument, by which a call looks its choice up."""
        return dtypes.name_of(self.args(self.workload.seed)[0].dtype)


def problems(
    shapes: Sequence[Shape],
    butterflies: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    names: Iterable[str] | None = None,
    backends: Sequence[str] | None = None,
) -> list[Problem]:
    """Everything to be measured, each class once.

    Args:
        shapes, butterflies: layers, and (n_factors, block_size) where they fit.
        dtype, device: of the rows.
        names: the decisions to measure; None: all.
        backends: the backends to try; None: all of the device.
    """
    names = set(tuned.tunables if names is None else names)
    found: dict[tuple, Problem] = {}
    for shape in shapes:
        for m, b in butterflies:
            if not checks.is_valid(shape.d, b, m):
                continue
            workload = Workload(*shape, m, b, dtype, device)
            for op in backend.ops().values():
                if op.name in names and op.tunable is not None and op.tunable.name == op.name:
                    for problem in _of_operator(op, workload, backends):
                        found.setdefault((op.name, problem.dtype, str(problem)), problem)
            if PLAN.name in names:
                problem = _of_plan(workload)
                found.setdefault((PLAN.name, problem.dtype, str(problem)), problem)
    return [*found.values()]


def _of_operator(
    op: backend.Op, workload: Workload, backends: Sequence[str] | None
) -> Iterable[Problem]:
    order = (*backend.PREFERENCE[workload.device.type], "reference")
    for index, args in enumerate(op.samples(workload)):
        able = [b for b in order if b not in op.unavailable and op.supports(b, args)]
        default = Choice(able[0])
        structure, sizes = _class(op.tunable, args)
        others = [Choice(b) for b in able if b != default.backend and b in (backends or able)]
        if "triton" in able and "triton" in (backends or able):
            found = tiles(op, structure, dtypes.name_of(args[0].dtype))
            others += [Choice("triton", tile) for tile in found]
        yield Problem(
            tunable=op.tunable,
            workload=workload,
            args=lambda seed, i=index: [*op.samples(replace(workload, seed=seed))][i],
            run=op,
            comparable=op.comparable,
            default=default,
            others=tuple(others),
            structure=structure,
            sizes=sizes,
        )


def _of_plan(workload: Workload) -> Problem:
    """The training step of a layer but for the optimizer, with each number of stages and side."""
    m, b, device = workload.n_factors, workload.block_size, workload.device.type
    stages = plan(m, b, device)
    weight_side = rotates_weight(stages, device, workload.rows, workload.n)
    default = plan_choice(len(stages), weight_side)
    counts = [n for n in range(1, m + 1) if _fits(plan(m, b, device, n))]
    every = [plan_choice(n, False) for n in counts]
    every += [plan_choice(1, True)] * (1 in counts)
    structure, sizes = _class(PLAN, (workload.x(), m, b, workload.n))
    return Problem(
        tunable=PLAN,
        workload=workload,
        args=lambda seed: _layer(replace(workload, seed=seed)),
        run=training_step,
        comparable=lambda result: result,
        default=default,
        others=tuple(choice for choice in every if choice != default),
        structure=structure,
        sizes=sizes,
    )


def _fits(stages: Sequence) -> bool:
    return max(stage.size for stage in stages) <= MOST_FEATURES


def _class(tunable: Tunable, args: tuple) -> tuple[dict[str, int], dict[str, int]]:
    structure, sizes = tunable.shape_class.of(*args)
    names = tunable.shape_class
    return (
        dict(zip(names.structure, map(int, structure), strict=True)),
        dict(zip(names.sizes, map(int, sizes), strict=True)),
    )


def _layer(w: Workload) -> tuple:
    weight = w.tensor(w.n, w.d, std=w.d**-0.5)
    scale = 1 + w.tensor(w.n, std=0.1, dtype=w.compute_dtype)
    return w.x(), weight, w.skew(), scale, w.tensor(w.n, salt=1), w.tensor(w.rows, w.n, salt=2)


def training_step(x, weight, skew, scale, bias, grad) -> tuple[torch.Tensor, ...]:
    """Forward and backward of a layer -> output, gradients of x, skew and scale."""
    leaves = [t.detach().requires_grad_(True) for t in (x, skew, scale)]
    with torch.enable_grad():
        y = boft_linear(leaves[0], weight, leaves[1], leaves[2], bias)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def shapes_of(text: str, rows: int) -> list[Shape]:
    """The layers that comma-separated names of models, DxNxROWS and JSON files stand for.

    Raises:
        ValueError: a part is none of them.
    """
    shapes: list[Shape] = []
    for part in text.split(","):
        if part in MODELS:
            shapes += [Shape(d, n, rows) for d, n in MODELS[part]]
        elif Path(part).is_file():
            shapes += [_shape(item, part) for item in _items(part)]
        else:
            numbers = part.split("x")
            known = all(number.isdecimal() for number in numbers)
            shapes.append(_shape([*map(int, numbers)] if known else part, text))
    return list(dict.fromkeys(shapes))


def _items(path: str) -> list:
    try:
        items = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"shapes: expected JSON in {path!r}: {error}") from None
    if not isinstance(items, list):
        raise ValueError(f"shapes: expected a list of [d, n, rows], got {items!r} in {path!r}")
    return items


def _shape(numbers: object, where: str) -> Shape:
    is_list = isinstance(numbers, list) and len(numbers) == 3
    if not is_list or not all(type(number) is int for number in numbers):
        raise ValueError(
            f"shapes: expected {', '.join(MODELS)}, DxNxROWS or a JSON file of [d, n, rows], got "
            f"{numbers!r} in {where!r}"
        )
    if min(numbers) < 1:
        raise ValueError(f"shapes: expected positive numbers, got {numbers!r} in {where!r}")
    return Shape(*numbers)
