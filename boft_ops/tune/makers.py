"""The problems of linear layers: operators with random arguments, whole layers, the process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .._runtime import backend, native
from .._runtime.checks import is_valid
from .._runtime.shape_class import CLASSES
from .._runtime.tuned import pinned
from ..ops.stage_from_skew import is_one_small_stage
from ..ops.stages import plan
from .cost import plans
from .machine import Machine
from .problems import Problem, dense_step, skew_step

ADAPTERS = 8  # in the batches of rotate_indexed, each of neighbouring rows


class Shape(NamedTuple):
    """A linear layer of d inputs and n outputs, and how many rows go through it."""

    d: int
    n: int
    rows: int


def problems(
    shapes: Sequence[Shape],
    butterflies: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    machine: Machine,
    ops: Sequence[str] | None = None,
) -> list[Problem]:
    """Everything to be tuned, each class once; ``ops``: no others than these, in their order.

    A butterfly takes part at the shapes that it fits.
    """
    maker = _Maker(dtype, device, machine)
    found: dict[tuple, Problem] = {}
    for shape in shapes:
        for m, b in butterflies:
            if not is_valid(shape.d, b, m):
                continue
            for problem in maker.of(shape, m, b):
                found.setdefault(problem.key, problem)
    if device.type == "cpu" and native.library is not None:
        for problem in maker.process([*found.values()]):
            found[problem.key] = problem
    if ops is None:
        return [*found.values()]
    return sorted((p for p in found.values() if p.op in ops), key=lambda p: ops.index(p.op))


class _Maker:
    def __init__(self, dtype: torch.dtype, device: torch.device, machine: Machine) -> None:
        self.dtype, self.device, self.machine = dtype, device, machine
        self.wide = torch.promote_types(dtype, torch.float32)

    def tensor(
        self, *shape: int, seed: int, scale: float = 1.0, wide: bool = False
    ) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(1000 * seed + len(shape))
        dtype = self.wide if wide else self.dtype
        return scale * torch.randn(
            shape, generator=generator, device=self.device, dtype=self.wide
        ).to(dtype)

    def problem(self, op: str, make: Callable, run: Callable, **more: Any) -> Problem:
        """With the shape class of the arguments that it makes."""
        args = make(0)
        if op == "plan":
            structure, sizes = CLASSES[op].of(args[0], *more.pop("butterfly"))
        else:
            structure, sizes = CLASSES[op].of(*args)
        return Problem(
            op,
            str(args[0].dtype).removeprefix("torch."),
            dict(zip(CLASSES[op].structure, structure, strict=True)),
            dict(zip(CLASSES[op].sizes, sizes, strict=True)),
            self.device,
            make,
            run,
            **more,
        )

    def of(self, shape: Shape, m: int, b: int) -> Iterator[Problem]:
        d, n, rows = shape
        stages = plan(m, b, self.device.type)
        yield from self._make_stages(d, m, b)
        e = self.dtype.itemsize
        for stage in stages:
            place = stage.chunk, stage.stride
            splits = stage.splits(torch.empty(1, d, device=self.device))

            def rotate(seed: int, stage=stage, place=place) -> tuple:
                return (
                    self.tensor(rows, d, seed=seed),
                    self._stage(d, stage.size, seed),
                    *place,
                    False,
                )

            def gram(seed: int, stage=stage, place=place, splits=splits) -> tuple:
                x, grad = (self.tensor(rows, d, seed=seed + i) for i in (0, 100))
                return x, grad, stage.size, *place, splits

            def both(seed: int, rotate=rotate, splits=splits) -> tuple:
                return self.tensor(rows, d, seed=seed + 100), *rotate(seed), splits

            def indexed(seed: int, stage=stage, place=place) -> tuple:
                x = self.tensor(rows, d, seed=seed)
                stages = self._stage(ADAPTERS * d, stage.size, seed).unflatten(0, (ADAPTERS, -1))
                index = torch.arange(rows, device=self.device) * ADAPTERS // rows
                return x, stages, index.to(torch.int32), *place, False

            array, work = rows * d * e, 2 * rows * d * stage.size
            yield self._op("rotate", rotate, n_bytes=2 * array, flops=work)
            yield self._op("rotate_indexed", indexed, n_bytes=2 * array, flops=work)
            summed = lambda partials: partials.sum(0)  # noqa: E731
            yield self._op("gram", gram, n_bytes=2 * array, flops=work, reduce=summed)
            yield self._op(
                "rotate_backward",
                both,
                n_bytes=3 * array,
                flops=2 * work,
                reduce=lambda result: (result[0], result[1].sum(0)),
            )
        yield from self._scale(rows, n)
        if self._has("rotated_linear"):
            yield self._linear(shape, stages[0].size)
        yield self._plan(shape, m, b)
        if m > 1 and len(stages) == 1:  # the stage that a layer with a given rotation has
            yield self._plan(shape, 1, stages[0].size)

    def _op(self, name: str, make: Callable, **more: Any) -> Problem:
        return self.problem(name, make, backend._ops[name], **more)

    def _stage(self, d: int, size: int, seed: int) -> torch.Tensor:
        noise = self.tensor(d // size, size, size, seed=seed, scale=0.1 / size, wide=True)
        return noise + torch.eye(size, device=self.device, dtype=self.wide)

    def _make_stages(self, d: int, m: int, b: int) -> Iterator[Problem]:
        blocks, packed = d // b, b * (b - 1) // 2
        stages = plan(m, b, self.device.type)

        def skew(seed: int) -> tuple:
            return self.tensor(m, blocks, packed, seed=seed, scale=0.1, wide=True), None

        def factors(seed: int, count: int = m) -> torch.Tensor:
            with torch.no_grad(), pinned():
                return backend._ops["cayley"](skew(seed)[0][:count].contiguous(), None)

        width = self.wide.itemsize
        numbers = m * blocks * (packed + b * b) * width
        if packed == 0:
            return
        if is_one_small_stage(stages, "exact") and m > 1:
            size = stages[0].size
            splits = stages[0].splits(torch.empty(1, d, device=self.device))

            def upstream(seed: int) -> tuple:
                grad = self.tensor(splits, d // size, size, size, seed=seed + 100, wide=True)
                return factors(seed), None, grad

            more = {"n_bytes": numbers + d * size * width}
            yield self._op("stage_from_skew", skew, **more)
            yield self._op("stage_from_skew_backward", upstream, **more)
            return
        yield self._op("cayley", skew, n_bytes=numbers)
        yield self._op(
            "cayley_backward",
            lambda seed: (factors(seed), None, self.tensor(m, blocks, b, b, seed=seed, wide=True)),
            n_bytes=numbers,
        )

    def _scale(self, rows: int, n: int) -> Iterator[Problem]:
        def vectors(seed: int) -> tuple:
            return tuple(self.tensor(n, seed=seed + i, wide=True) for i in (0, 100))

        def forward(seed: int) -> tuple:
            scale, center = vectors(seed)
            return self.tensor(rows, n, seed=seed), scale, center, center

        def backward(seed: int) -> tuple:
            return *(self.tensor(rows, n, seed=seed + i) for i in (0, 100)), *vectors(seed)

        array = rows * n * self.dtype.itemsize
        yield self._op("scale", forward, n_bytes=2 * array)
        yield self._op("scale_backward", backward, n_bytes=3 * array)

    def _has(self, op: str) -> bool:
        """Whether the native library has this op for the device: one that others can stand for."""
        return op in native.kernels(self.device.type)

    def _linear(self, shape: Shape, size: int) -> Problem:
        """One stage, given, and the product: forward and backward."""
        d, n, rows = shape

        def make(seed: int) -> tuple:
            *operands, grad = self._layer(shape, self._stage(d, size, seed), seed)
            return *operands, self.device.type != "cpu", True, grad  # the op's, and the gradient

        return self.problem(
            "rotated_linear",
            make,
            dense_step,
            n_bytes=(2 * rows * d + 3 * rows * n + 2 * d * n) * self.dtype.itemsize,
            flops=4 * rows * d * (n + 1.5 * size),
        )

    def _plan(self, shape: Shape, m: int, b: int) -> Problem:
        """A layer's training step but for the optimizer.

        One factor is given: making it is the same on both sides.
        """
        d, n, rows = shape
        given = m == 1
        modelled = plans(rows, d, n, m, b, _name(self.dtype), self.machine, self.device.type)
        most = max(256, plan(m, b, self.device.type)[-1].size)  # what kernels there are take

        def make(seed: int) -> tuple:
            if given:  # orthogonal, as whatever is given is
                rotation = torch.linalg.qr(self._stage(d, b, seed))[0]
            else:
                packed = b * (b - 1) // 2
                rotation = self.tensor(m, d // b, packed, seed=seed, scale=0.1, wide=True)
            return self._layer(shape, rotation, seed)

        return self.problem(
            "plan",
            make,
            dense_step if given else skew_step,
            butterfly=(m, b, n),
            n_bytes=(5 * rows * d + 3 * rows * n + 2 * d * n) * self.dtype.itemsize,
            flops=4 * rows * d * n,
            plans=[
                (cost.total, {"stages": len(cost.stages), "weight_side": int(cost.side != "in")})
                for cost in modelled
                if max(s.size for s in cost.stages) <= most
            ],
        )

    def _layer(self, shape: Shape, rotation: torch.Tensor, seed: int) -> tuple:
        d, n, rows = shape
        x, grad = self.tensor(rows, d, seed=seed), self.tensor(rows, n, seed=seed + 100)
        weight = self.tensor(n, d, seed=seed, scale=d**-0.5)
        scale = 1 + self.tensor(n, seed=seed, scale=0.1, wide=True)
        return x, weight, rotation, scale, self.tensor(n, seed=seed + 100), grad

    def process(self, members: Sequence[Problem]) -> Iterator[Problem]:
        """The C++ kernels' numbers, over all that those problems call."""
        baskets = {
            "blocking": [p for p in members if p.op == "rotated_linear"],
            "grain": [p for p in members if p.op in backend._ops and p.op != "rotated_linear"],
        }
        for op, basket in baskets.items():
            if basket:
                yield Problem(
                    op,
                    "",
                    {},
                    {},
                    self.device,
                    lambda seed, basket=basket: tuple(p.make(seed) for p in basket),
                    lambda *args, basket=basket: [
                        p.reduce(p.run(*a)) for p, a in zip(basket, args, strict=True)
                    ],
                )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
