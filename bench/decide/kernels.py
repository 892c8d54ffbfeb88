"""Section "kernels": the kernels of a layer on the device alone, and variants of their tiles.

``cases`` lists the calls, ``choices`` what each is tried with: every backend, the tiles of the
tuner's own space that are nearest to the default, and other numbers of partial sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

from boft_ops._runtime import backend, dtypes, gpu, tuned
from boft_ops._runtime.tuned import Choice
from boft_ops._runtime.workload import Workload
from boft_ops.ops.stages import Stage, plan
from boft_ops.tune.workloads import tiles

from .contest import Part, Rival, Setting, on_device
from .lines import Writer

# (m, b, number of stages) of butterflies with block size 8: groups of 16, 64, 128 and 256
# neighboring features, then stages whose chunks lie apart, of 32, 64 and 128 features.
CONTIGUOUS = ((2, 8, 1), (4, 8, 1), (5, 8, 1), (6, 8, 1))
STRIDED = ((6, 8, 2), (8, 8, 2), (10, 8, 2))
# The rows that a pass reads and writes, in parts of what a copy does.
COPIES = {
    "rotate": 1.0, "rotate_backward": 1.5, "rotate_stage_grad": 1.0,
    "scale": 1.0, "scale_backward": 1.5,
}  # fmt: skip
# Operators whose last argument is the number of partial sums, and other numbers to try: fewer make
# one wave of programs, more make shorter ones.
SPLIT, SPLIT_PARTS = ("rotate_backward", "rotate_stage_grad"), (1 / 3, 1 / 2, 2 / 3, 2)
WARM_ROWS = 1024  # enough for a kernel to be compiled as for many rows


@dataclass(frozen=True)
class Case:
    """A call of an operator, as a layer makes it.

    Attributes:
        part: its name in the lines.
        op: the operator.
        workload: the layer.
        make: the workload -> the arguments of a call.
        facts: numbers that rules choose cases by.
    """

    part: str
    op: backend.Op
    workload: Workload
    make: Callable[[Workload], tuple]
    facts: dict[str, Any]

    def args(self, seed: int, rows: int | None = None) -> tuple:
        """Make the arguments of a call with random numbers of its own."""
        return self.make(replace(self.workload, seed=seed, rows=rows or self.workload.rows))


def cases(setting: Setting) -> list[Case]:
    """List the calls, the most important one first."""
    workload = Workload(
        setting.width, setting.width, setting.bulk, 2, 8, setting.dtype, setting.device
    )
    found = []
    for butterfly in CONTIGUOUS:
        found += _of_rows(workload, *butterfly, "rotate", "rotate_backward")
    found += [_sample(workload, name) for name in ("scale", "scale_backward")]
    small = ("stage_from_skew", "stage_from_skew_backward")
    found += [_sample(workload, name) for name in small]
    for butterfly in STRIDED:
        found += _of_rows(workload, *butterfly, "rotate", "rotate_backward")
    model = replace(workload, d=sum(setting.linears))
    found += [_sample(model, name) for name in (*small, "cayley", "cayley_backward")]
    for butterfly in (*CONTIGUOUS, *STRIDED):  # the weight side takes these in their place
        found += _of_rows(workload, *butterfly, "rotate_stage_grad")
    return found


def _of_rows(workload: Workload, m: int, b: int, n_stages: int, *names: str) -> Iterator[Case]:
    """Yield the passes over rows through the last stage of a butterfly, if it fits the features."""
    stage = plan(m, b, workload.device.type, n_stages)[-1]
    if workload.d % (stage.size * stage.stride):
        return
    workload = replace(workload, n_factors=m, block_size=b)
    facts = {"size": stage.size, "chunk": stage.chunk, "stride": stage.stride, "block_size": b}
    where = f"stride {stage.stride}, " if stage.stride > 1 else ""
    where = f"groups of {stage.size}, {where}{workload.rows} rows of {workload.d}"
    for name in names:
        make = partial(ARGUMENTS[name], stage)
        more = {"op": name, "copies": COPIES[name]}
        yield Case(f"{name}, {where}", backend.ops()[name], workload, make, facts | more)


def _rotate(stage: Stage, w: Workload) -> tuple:
    return w.x(), w.matrices(w.d // stage.size, stage.size), stage.chunk, stage.stride, False


def _rotate_backward(stage: Stage, w: Workload) -> tuple:
    x, *rest = _rotate(stage, w)
    return w.grad_x(), x, *rest, stage.splits(x)


def _rotate_stage_grad(stage: Stage, w: Workload) -> tuple:
    x = w.x()
    return x, w.grad_x(), stage.size, stage.chunk, stage.stride, stage.splits(x)


ARGUMENTS = {
    "rotate": _rotate,
    "rotate_backward": _rotate_backward,
    "rotate_stage_grad": _rotate_stage_grad,
}


def _sample(workload: Workload, name: str) -> Case:
    """Return the first sample that an operator declares for a layer."""
    op = backend.ops()[name]

    def make(w: Workload) -> tuple:
        return next(iter(op.samples(w)))

    rows = f", {workload.rows} rows" if name in COPIES else ""
    part = f"{name}, (2,8) of {workload.d} features{rows}"
    facts = {"op": name, "features": workload.d, "block_size": workload.block_size}
    if name in COPIES:
        facts["copies"] = COPIES[name]
    return Case(part, op, workload, make, facts)


class Variant(NamedTuple):
    """One way to make a call.

    Attributes:
        name: key in the lines.
        choice: backend and tile.
        splits: number of partial sums; None for that of the call.
    """

    name: str
    choice: Choice
    splits: int | None = None

    def args(self, args: tuple) -> tuple:
        """Return the arguments of the call with the number of partial sums, which is the last."""
        return args if self.splits is None else (*args[:-1], self.splits)


def choices(case: Case, args: tuple, variants: int) -> list[Variant]:
    """List the backends that take a call, then tiles near the default and numbers of splits.

    Args:
        case: the call.
        args: its arguments.
        variants: largest number of tiles; 0 leaves the numbers of splits out too.
    """
    op = case.op
    device = case.workload.device.type
    # On a GPU a reference may wait for the device, which no graph can hold.
    order = (*backend.PREFERENCE[device], *(("reference",) if device == "cpu" else ()))
    able = [b for b in order if b not in op.unavailable and op.supports(b, args)]
    found = [Variant(name, Choice(name)) for name in able]
    if "triton" in able and op.tiles() is not None:
        names = op.tunable.shape_class
        structure = dict(zip(names.structure, map(int, names.of(*args)[0]), strict=True))
        dtype = dtypes.name_of(args[0].dtype)
        number = args[0].get_device()
        default = op.tiles().default(structure, dtype, gpu.limits_of(number))
        for choice in tiles(op, structure, dtype, number)[:variants]:
            differs = [f"{k}={v}" for k, v in choice.config if v != getattr(default, k)]
            found.append(Variant(f"triton {' '.join(differs)}", choice))
    if "triton" in able and variants and op.name in SPLIT:
        splits = args[-1]
        for other in sorted({max(1, round(splits * part)) for part in SPLIT_PARTS} - {splits}):
            found.append(Variant(f"triton splits={other}", Choice("triton"), other))
    return found


@contextmanager
def as_chosen(case: Case, choice: Choice) -> Iterator[None]:
    """Within the block the operator of a case runs as chosen, outside of autograd."""
    with torch.no_grad(), tuned.pinned(**{case.op.name: choice}):
        yield


def parts(setting: Setting, writer: Writer) -> Iterator[Part]:
    """Yield each call by all backends, then each call with variants of its tile."""
    every = cases(setting)
    seconds = setting.seconds / (2 * len(every))
    for variants in (0, setting.variants):
        for case in every:
            part = f"{case.part}: tiles" if variants else case.part
            yield part, partial(_measure, writer, part, case, setting, seconds, variants)


def _measure(
    writer: Writer, part: str, case: Case, setting: Setting, seconds: float, variants: int
) -> None:
    sets = [case.args(seed) for seed in range(setting.sets)]
    found = choices(case, sets[0], variants)
    if variants:
        found = [variant for variant in found if variant.choice.backend == "triton"]
        if len(found) < 2:
            return

    def calls(variant: Variant) -> list[Callable[[], object]]:
        return [partial(case.op, *variant.args(args)) for args in sets]

    # First the default: a contest is compared with the first of its contestants.
    rivals = [
        Rival(
            variant.name,
            variant.name,
            partial(calls, variant),
            within=partial(as_chosen, case, variant.choice),
            facts={"backend": variant.choice.backend, "tile": dict(variant.choice.config)},
        )
        for variant in found
    ]
    if "copies" in case.facts:  # a clone in every round: the ceiling of a pass over rows
        clones = [lambda x=a[0]: x.clone() for a in sets]
        rivals.append(Rival("clone", "x.clone()", lambda: clones))
    on_device(writer, part, rivals, setting, seconds, **case.facts)


def warm_up(setting: Setting, share: int, shares: int) -> None:
    """Compile the kernels of one share of the variants into Triton's cache, by running them once.

    Several processes do this while the sections before this one are measured.
    """
    every = cases(setting)
    small = [case.args(0, min(WARM_ROWS, setting.bulk)) for case in every]
    columns = [
        [(case, args, variant) for variant in choices(case, args, setting.variants)]
        for case, args in zip(every, small, strict=True)
    ]
    # all defaults first, then the nearest tile of each call, and so on
    todo = [item for row in zip_longest(*columns) for item in row if item is not None]
    for case, args, variant in todo[share::shares]:
        if variant.choice.backend != "triton":
            continue
        try:
            with as_chosen(case, variant.choice):
                case.op(*variant.args(args))
        except Exception:  # it fails again in its section, which says so
            torch.cuda.synchronize()  # raises if this process can run nothing more
