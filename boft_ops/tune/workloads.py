"""Decisions that the tuner measures: each operator that a layer calls, and the layer's plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from .._runtime import backend, checks, dtypes, gpu, tuned
from .._runtime.limits import MAX_STAGE
from .._runtime.tuned import Choice, Tunable
from .._runtime.workload import Workload
from ..ops.linear import boft_linear
from ..ops.planner import PLAN, default_plan, plan_choice
from ..ops.stages import plan

# (inputs, outputs) of each kind of adapted linear layer
MODELS = {
    "llama-2-7b": ((4096, 4096), (4096, 11008), (11008, 4096)),
    "llama-3-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
    "deberta-v3-base": ((768, 768), (768, 3072), (3072, 768)),
    "dinov2-large": ((1024, 1024), (1024, 4096), (4096, 1024)),
    "sd-1.5": ((320, 320), (640, 640), (1280, 1280), (768, 320), (768, 640), (768, 1280)),
}
STAGES = (1, 2, 3, 4)  # values of num_stages


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
        key: op, dtype, structure and sizes, as a row of the file has them.
    """

    tunable: Tunable
    workload: Workload
    args: Callable[[int], tuple]
    run: Callable[..., Any]
    comparable: Callable[[Any], Any]
    default: Choice
    others: tuple[Choice, ...]
    key: dict[str, Any]

    def __str__(self) -> str:
        numbers = [f"{k}={v}" for k, v in (self.key["structure"] | self.key["sizes"]).items()]
        return " ".join([self.key["op"], *numbers, self.key["dtype"]])

    def run_with(self, choice: Choice, args: tuple) -> Any:
        """Result of a call in which the decision is made so, and every other one by default."""
        with tuned.pinned(**{self.tunable.name: choice}):
            return self.run(*args)

    def row(self, choice: Choice, **seen: Any) -> dict[str, Any]:
        """The row of a file that keeps a choice."""
        return {**self.key, "backend": choice.backend, "config": dict(choice.config), **seen}


def problems(
    shapes: Sequence[Shape],
    butterflies: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    names: Iterable[str] | None = None,
) -> list[Problem]:
    """One problem for each shape class that these layers have.

    Args:
        shapes: layers.
        butterflies: (n_factors, block_size), for the layers that they fit.
        dtype, device: of the rows.
        names: the decisions to measure; None: all.
    """
    names = set(tuned.tunables if names is None else names)
    found: dict[str, Problem] = {}
    for shape in shapes:
        for m, b in butterflies:
            if not checks.is_valid(shape.d, b, m):
                continue
            workload = Workload(*shape, m, b, dtype, device)
            measured = [op for op in backend.ops().values() if op.name in names and op.is_measured]
            made = [problem for op in measured for problem in _of_operator(op, workload)]
            if PLAN.name in names:
                made.append(_of_plan(workload))
            for problem in made:
                found.setdefault(str(problem), problem)
    return [*found.values()]


def tiles(op: backend.Op, structure: dict[str, int], dtype: str, device: int) -> list[Choice]:
    """Every tile but the default one of a CUDA device, given by its number, nearest first.

    A step halves or doubles one field, or changes num_stages. Two steps reach what was fastest on
    an H200 from each default; kernels with few fields get four.
    """
    table = op.tiles()
    default = None if table is None else table.default(structure, dtype, gpu.limits_of(device))
    if default is None:
        return []
    found = dict.fromkeys([default])  # in the order in which they are found
    for _ in range(2 if len(default) > 4 else 4):
        for tile in [*found]:
            for field, value in tile._asdict().items():
                nearby = STAGES if field == "num_stages" else (value // 2, value * 2)
                found |= {tile._replace(**{field: other}): None for other in nearby if other >= 1}
    del found[default]
    legal = [tile for tile in found if table.is_legal(tile, structure, dtype)]
    return [Choice("triton", tuple(tile._asdict().items())) for tile in legal]


def _of_operator(op: backend.Op, workload: Workload) -> Iterable[Problem]:
    for index, args in enumerate(op.samples(workload)):
        order = (*backend.PREFERENCE[workload.device.type], "reference")
        able = [Choice(b) for b in order if b not in op.unavailable and op.supports(b, args)]
        key = _key(op.tunable, args[0], args)
        if "triton" in [choice.backend for choice in able]:
            able += tiles(op, key["structure"], key["dtype"], args[0].get_device())
        make = lambda seed, i=index: [*op.samples(replace(workload, seed=seed))][i]  # noqa: E731
        default, *others = able
        yield Problem(op.tunable, workload, make, op, op.comparable, default, (*others,), key)


def _of_plan(workload: Workload) -> Problem:
    """A training step of a layer without the optimizer, with each plan."""
    m, b, device = workload.n_factors, workload.block_size, workload.device.type
    default = default_plan(m, b, device, workload.rows, workload.n)
    every = [
        plan_choice(count, weight_side)
        for count in range(1, m + 1)
        for weight_side in (False, True)
        if max(stage.size for stage in plan(m, b, device, count)) <= MAX_STAGE
    ]
    others = tuple(choice for choice in every if choice != default)
    make = lambda seed: _layer(replace(workload, seed=seed))  # noqa: E731
    x = workload.x()
    key = _key(PLAN, x, (x, m, b, workload.n))
    return Problem(PLAN, workload, make, training_step, lambda step: step, default, others, key)


def _key(tunable: Tunable, x: torch.Tensor, args: tuple) -> dict[str, Any]:
    names = tunable.shape_class
    structure, sizes = names.of(*args)
    return {
        "op": tunable.name,
        "dtype": dtypes.name_of(x.dtype),
        "structure": dict(zip(names.structure, map(int, structure), strict=True)),
        "sizes": dict(zip(names.sizes, map(int, sizes), strict=True)),
    }


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
    """Layers by comma-separated names of models and DxNxROWS, such as "llama-2-7b,4096x4096x512".

    Raises:
        ValueError: a part is neither.
    """
    shapes: list[Shape] = []
    for part in text.split(","):
        numbers = [int(number) for number in part.split("x") if number.isdecimal()]
        if part in MODELS:
            shapes += [Shape(d, n, rows) for d, n in MODELS[part]]
        elif len(numbers) == part.count("x") + 1 == 3 and min(numbers) > 0:
            shapes.append(Shape(*numbers))
        else:
            raise ValueError(f"shapes: expected {', '.join(MODELS)} or DxNxROWS, got {part!r}")
    return list(dict.fromkeys(shapes))
