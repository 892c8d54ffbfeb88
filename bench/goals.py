"""The goals of the project, and what a run says about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from contestants import BULK, FLOOR, LORA, PEFT_BOFT, SHAPES, Shape
from interleave import summary
from operators import BACKWARD, BOTH, FORWARD
from results import Results
from sizes import CPU, GPU

MET, NOT_MET, UNCLEAR = "met", "not met", "not separable"
OURS = "boft-2-8"  # the one that most of the goals are about
MEDIUM, LARGE = Shape(2048, 2048, 1024), Shape(4096, 4096, 512)


class Goal(NamedTuple):
    text: str
    measured: str
    verdict: str


class Part(NamedTuple):
    """A goal at one place.

    Attributes:
        place: the shape, or "" for a goal that has but one place.
        measured: what came out, in words.
        excess: by round, how far beyond the bound; zero and less is within.
    """

    place: str
    measured: str
    excess: list[float]

    @property
    def verdict(self) -> str:
        """By the quartiles: a difference around zero is none."""
        _, low, high = summary(self.excess)
        if high <= 0:
            return MET
        return NOT_MET if low > 0 else UNCLEAR

    def __str__(self) -> str:
        kept = sum(e <= 0 for e in self.excess)
        place = f"{self.place} {self.verdict}: " if self.place else ""
        return f"{place}{self.measured}, kept in {kept} of {len(self.excess)} rounds"


def goals(results: Results) -> list[Goal]:
    """The goals of this run's backend that it can speak about: it measured all they need."""
    machine = results.machine
    sources = {"auto": [_with_kernels], "reference": [_in_plain_torch]}.get(machine["backend"], [])
    if machine["device"] != "cpu" and (machine["backend"], machine["dtype"]) == ("auto", "bf16"):
        sources.append(_on_gpu)
    found = []
    for text, parts, needed in chain.from_iterable(source(results) for source in sources):
        if None not in parts:
            found.append(Goal(text, "; ".join(map(str, parts)), _verdict(parts, needed)))
    return found


def gpu_goals() -> list[str]:
    """The goals that a run on a GPU alone can speak about, in words."""
    nothing = Results({"machine_info": {}, "commit_info": {}, "datetime": "", "benchmarks": []})
    return [text for text, _, _ in _on_gpu(nothing)]


def _verdict(parts: Sequence[Part], needed: int) -> str:
    """Of a goal that is to be met at so many of the places."""
    verdicts = [part.verdict for part in parts]
    if verdicts.count(MET) >= needed:
        return MET
    return NOT_MET if verdicts.count(NOT_MET) > len(parts) - needed else UNCLEAR


Candidate = tuple[str, list[Part | None], int]  # text, places, how many of them must meet it


def _with_kernels(results: Results) -> Iterator[Candidate]:
    n = len(SHAPES)
    layer = f"BOFT(2,8), {BOTH}"
    yield (
        f"{layer}: overhead at most half of PEFT LoRA r=16's, at each shape",
        [_overhead(results, shape, OURS, 0.5) for shape in SHAPES],
        n,
    )
    yield (
        f"BOFT(4,4), {BOTH}: overhead at most that of PEFT LoRA r=16, at each shape",
        [_overhead(results, shape, "boft-4-4", 1.0) for shape in SHAPES],
        n,
    )
    yield (
        f"BOFT(10,8), {BOTH}: overhead at most that of PEFT LoRA r=16 at {LARGE}",
        [_overhead(results, LARGE, "boft-dense", 1.0)],
        1,
    )
    for peer, kind in (("peft-oft", "default"), ("peft-oft-exact", "exact")):
        yield (
            f"{layer}: faster than PEFT OFT ({kind}), at each shape",
            [_speedup(results, str(shape), BOTH, peer, OURS, 1) for shape in SHAPES],
            n,
        )
    for shape, times in ((MEDIUM, 5), (LARGE, 20)):
        yield _against_peft_boft(results, shape, times)
    for direction in (FORWARD, BACKWARD):
        yield (
            f"cayley, {direction}: at least 10 times faster than torch.linalg.solve",
            [_speedup(results, CPU.cayley, direction, "solve", "cayley", 10, alone=True)],
            1,
        )
    for direction, what, limit in (
        (FORWARD, FORWARD, 1.5),
        (BACKWARD, f"{BACKWARD} with the Gram matrices", 2.5),
    ):
        yield (
            f"rotation (2,8), {what}: at most {limit} times x.clone()",
            [_slowdown(results, CPU.rotation, direction, "clone", "rotate-2-8", limit)],
            1,
        )


def _in_plain_torch(results: Results) -> Iterator[Candidate]:
    yield (
        f"BOFT(2,8), {BOTH}: overhead at most that of PEFT LoRA r=16 on at least 3 of 4 shapes",
        [_overhead(results, shape, OURS, 1.0) for shape in SHAPES],
        3,
    )
    yield _against_peft_boft(results, MEDIUM, 5)


SMALL_GROUPS = {16: "rotate-2-8", 64: "rotate-4-8"}  # features mixed -> contestant
LARGE_GROUPS = {256: "rotate-6-8", GPU.features: "rotate-10-8"}


def _on_gpu(results: Results) -> Iterator[Candidate]:
    """Of bfloat16 and rows enough to keep a GPU busy."""
    # a copy moves two arrays, so does a rotation; its backward with the Gram matrices moves three
    for direction, what, arrays in (
        (FORWARD, FORWARD, 2),
        (BACKWARD, f"{BACKWARD} with the Gram matrices, half as many bytes again", 3),
    ):
        for groups in (SMALL_GROUPS, LARGE_GROUPS):
            share = 0.85 if direction == FORWARD and groups is SMALL_GROUPS else 0.75
            most = arrays / 2 / share
            sizes = " and ".join(map(str, groups))
            yield (
                f"{GPU.rotation} in groups of {sizes}, {what}: at least {100 * share:.0f} % of the "
                f"bandwidth of x.clone(), so at most {most:.3g} times its time",
                [
                    _slowdown(results, GPU.rotation, direction, "clone", name, most, str(size))
                    for size, name in groups.items()
                ],
                len(groups),
            )
    model = f"rotations of all {len(GPU.linears)} linears of Llama-3.1-8B at (2,8), {FORWARD}"
    yield (
        f"{model}: at most 100 µs",
        [_duration(results, GPU.cayley, "butterfly_groups", 100e-6)],
        1,
    )
    yield (
        f"{model}: at least 50 times faster than torch.linalg.solve",
        [_speedup(results, GPU.cayley, FORWARD, "solve", "butterfly_groups", 50, alone=True)],
        1,
    )
    layer = f"BOFT(2,8), {BOTH}, at {BULK}"
    yield (
        f"{layer}: at most 1.15 times the frozen nn.Linear",
        [_slowdown(results, str(BULK), BOTH, FLOOR, OURS, 1.15)],
        1,
    )
    for peer, label in (
        (LORA, "LoRA r=16"),
        ("peft-oft", "OFT (default)"),
        ("peft-oft-exact", "OFT (exact)"),
        (PEFT_BOFT, "BOFT"),
    ):
        yield (
            f"{layer}: faster than PEFT {label}",
            [_speedup(results, str(BULK), BOTH, peer, OURS, 1, alone=True)],
            1,
        )
    # 28 numbers in and 64 out, against 3.35 TB/s, the bandwidth of an H100 by its data sheet
    floor = GPU.n_blocks * (28 + 64) * 4 / 3.35e12
    yield (
        f"cayley in CUDA C++ of {GPU.n_blocks} blocks, {FORWARD}: at most twice the time that its "
        f"bytes take at 3.35 TB/s, {2e6 * floor:.0f} µs",
        [_duration(results, GPU.cayley, "cayley-cuda", 2 * floor)],
        1,
    )


def _against_peft_boft(results: Results, shape: Shape, times: int) -> Candidate:
    text = f"BOFT(2,8), {BOTH}: at least {times} times faster than PEFT BOFT at {shape}"
    return text, [_speedup(results, str(shape), BOTH, PEFT_BOFT, OURS, times, alone=True)], 1


def _overhead(results: Results, shape: Shape, name: str, share: float) -> Part | None:
    """The overhead of ``name`` against a share of LoRA's, in parts of the frozen layer's time."""
    rounds = _paired(results, str(shape), BOTH, (FLOOR, LORA, name))
    if not rounds:
        return None
    ours, _, _ = summary([t / floor - 1 for floor, _, t in rounds])
    bound, _, _ = summary([share * (lora / floor - 1) for floor, lora, _ in rounds])
    excess = [(t - floor - share * (lora - floor)) / floor for floor, lora, t in rounds]
    difference = _quartiles(excess, lambda value: f"{value:+.1%}")
    measured = f"{ours:+.1%} against {bound:+.1%}, difference {difference}"
    return Part(str(shape), measured, excess)


def _speedup(
    results: Results,
    group: str,
    direction: str,
    peer: str,
    name: str,
    least: float,
    alone: bool = False,
) -> Part | None:
    """How many times as fast as the peer; ``alone``: the goal has no other place."""
    rounds = _paired(results, group, direction, (peer, name))
    if not rounds:
        return None
    times = [theirs / ours for theirs, ours in rounds]
    label = results.find(group, direction, peer).info["label"]
    measured = f"{_quartiles(times, '{:.2f}'.format)} times as fast as {label}"
    return Part("" if alone else group, measured, [least - value for value in times])


def _slowdown(
    results: Results,
    group: str,
    direction: str,
    peer: str,
    name: str,
    most: float,
    place: str = "",
) -> Part | None:
    rounds = _paired(results, group, direction, (peer, name))
    if not rounds:
        return None
    times = [ours / theirs for theirs, ours in rounds]
    return Part(place, f"{_quartiles(times, '{:.2f}'.format)} times", [v - most for v in times])


def _duration(results: Results, group: str, name: str, most: float) -> Part | None:
    """The time itself against a number of seconds."""
    times = [t for (t,) in _paired(results, group, FORWARD, (name,))]
    if not times:
        return None
    measured = _quartiles(times, lambda seconds: f"{1e6 * seconds:.1f}")
    return Part("", f"{measured} µs", [t - most for t in times])


def _paired(
    results: Results, group: str, direction: str, names: Sequence[str]
) -> list[tuple[float, ...]]:
    """The times of all of them, for each round in which all of them ran."""
    rows = [results.find(group, direction, name) for name in names]
    if None in rows:
        return []
    rounds = sorted(set.intersection(*(set(row.by_round) for row in rows)))
    return [tuple(row.by_round[r] for row in rows) for r in rounds]


def _quartiles(values: Sequence[float], show: Callable[[float], str]) -> str:
    middle, low, high = map(show, summary(values))
    return f"{middle} [{low}, {high}]"
