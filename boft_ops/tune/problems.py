"""What is tuned at a shape: operators with their arguments, whole layers, the process's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .._runtime import backend, native
from .._runtime.tuned import pinned
from .._runtime.tuned_table import Choice
from ..ops.linear import rotated_linear
from ..ops.rotation import DenseRotation, SkewRotation
from ..ops.stages import default_plan
from .machine import Machine
from .space import default_of, tiles

WORSE = 3.0  # times the best modelled time, above which a candidate is not tried
MOST = 48  # tiles that are tried
TUNABLES = {
    "grain": [{"grain": g} for g in (1 << 14, 1 << 15, 1 << 16, 1 << 17, 1 << 18)],
    "blocking": [
        {"linear_outputs": outputs, "linear_rows": rows}
        for outputs in (192, 384, 576)
        for rows in (512, 1024, 2048, 4096)
    ],
}


@dataclass
class Problem:
    """One choice to be made.

    Attributes:
        op: an operator, or "plan", "grain" or "blocking" (``_tuned.CLASSES``).
        dtype: of the first argument; "" where the choice is of the process.
        make: number of a set -> arguments.
        run: one call.
        reduce: its result -> what is compared with the reference.
        n_bytes, flops: what it cannot do without.
    """

    op: str
    dtype: str
    structure: dict[str, int]
    sizes: dict[str, int]
    device: torch.device
    make: Callable[[int], tuple]
    run: Callable[..., Any]
    n_bytes: float = 0.0
    flops: float = 0.0
    reduce: Callable[[Any], Any] = lambda result: result
    # of a plan: modelled seconds, configs
    plans: list[tuple[float, dict[str, int]]] = field(default_factory=list)

    def __str__(self) -> str:
        numbers = {**self.structure, **self.sizes}
        return " ".join([self.op, *(f"{k}={v}" for k, v in numbers.items()), self.dtype]).strip()

    @property
    def key(self) -> tuple:
        """As ``_tuned_file.key_of`` has it."""
        return self.op, self.dtype, *self.structure.items(), *self.sizes.items()

    def default(self, args: tuple) -> Choice:
        """What serves where nothing was measured."""
        if self.op in TUNABLES:
            return Choice((), "cpu", {name: native.DEFAULTS[name] for name in TUNABLES[self.op][0]})
        if self.op == "plan":
            m, b = self.structure.values()
            rows, _, outputs = self.sizes.values()
            stages, weight_side = default_plan(m, b, self.device.type, rows, outputs)
            return Choice((), "", {"stages": len(stages), "weight_side": int(weight_side)})
        op = backend._ops[self.op]
        serving = op.serving[self.device.type]
        return Choice((), serving if op.takes(serving, args) else "reference", {})

    def candidates(
        self, args: tuple, machine: Machine, backends: Sequence[str] | None = None
    ) -> list[Choice]:
        """The default, and every other that the cost model does not rule out.

        ``backends``: no others than these; by default all of the device.
        """
        default = self.default(args)
        if self.op in TUNABLES:
            found = [Choice((), "cpu", config) for config in TUNABLES[self.op]]
        elif self.op == "plan":
            found = [Choice((), "", config) for config in pruned(self.plans)]
        else:
            op = backend._ops[self.op]
            all_of = (*backend.PREFERENCE[self.device.type], "reference")
            names = [b for b in backends or all_of if b not in op.missing and op.takes(b, args)]
            found = [Choice((), name, {}) for name in names]
            if "triton" in names and default_of(self.op, self.structure, self.dtype):
                configs = tiles(self.op, self.structure, self.sizes, self.dtype, machine)
                found += [Choice((), "triton", config) for config in pruned(configs)]
        return [default, *(choice for choice in found if choice != default)]

    def apply(self, choice: Choice) -> AbstractContextManager[None]:
        """Within the block, ``run`` does as this choice says."""
        if self.op in TUNABLES:
            return _tunables(choice.config)
        return pinned(**{self.op: choice})


def pruned(modelled: Sequence[tuple[float, Any]]) -> list[Any]:
    """The best few, none of them expected to take more than WORSE times as long as the best."""
    ranked = sorted(modelled, key=lambda pair: pair[0])[:MOST]
    limit = WORSE * ranked[0][0] if ranked else 0.0
    return [candidate for seconds, candidate in ranked if seconds <= limit < float("inf")]


@contextmanager
def _tunables(config: dict[str, int]) -> Iterator[None]:
    before = {name: native.tunable(name) for name in config}
    native.set_tunables(config)
    try:
        with pinned():
            yield
    finally:
        native.set_tunables(before)


def skew_step(x, weight, skew, scale, bias, grad) -> tuple[torch.Tensor, ...]:
    """Run a training step of a layer whose rotation is made from ``skew``."""
    return _training_step(SkewRotation, x, weight, skew, scale, bias, grad)


def dense_step(x, weight, matrix, scale, bias, *others) -> tuple[torch.Tensor, ...]:
    """Run a training step of a layer whose rotation is given; the gradient is the last argument."""
    return _training_step(DenseRotation, x, weight, matrix, scale, bias, others[-1])


def _training_step(kind, x, weight, parameter, scale, bias, grad) -> tuple[torch.Tensor, ...]:
    """Return the output of a layer and the gradients of x, the rotation's parameter and scale."""
    leaves = [t.detach().requires_grad_(True) for t in (x, parameter, scale)]
    with torch.enable_grad():
        y = rotated_linear(leaves[0], weight, kind(leaves[1]), scale=leaves[2], bias=bias)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)
