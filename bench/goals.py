"""The goals of the project, and what a run says about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from contestants import FLOOR, LORA, PEFT_BOFT, SHAPES, Shape
from interleave import summary
from operators import BACKWARD, BOTH, CAYLEY, FORWARD, ROTATION
from results import Results

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
    sources = {"auto": _with_kernels, "reference": _in_plain_torch}
    found = []
    source = sources.get(results.machine["backend"], lambda _: ())
    for text, parts, needed in source(results):
        if None not in parts:
            found.append(Goal(text, "; ".join(map(str, parts)), _verdict(parts, needed)))
    return found


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
            [_speedup(results, CAYLEY, direction, "solve", "cayley", 10, alone=True)],
            1,
        )
    for direction, what, limit in (
        (FORWARD, FORWARD, 1.5),
        (BACKWARD, f"{BACKWARD} with the Gram matrices", 2.5),
    ):
        yield (
            f"rotation (2,8), {what}: at most {limit} times x.clone()",
            [_slowdown(results, ROTATION, direction, "clone", "rotate-2-8", limit)],
            1,
        )


def _in_plain_torch(results: Results) -> Iterator[Candidate]:
    yield (
        f"BOFT(2,8), {BOTH}: overhead at most that of PEFT LoRA r=16 on at least 3 of 4 shapes",
        [_overhead(results, shape, OURS, 1.0) for shape in SHAPES],
        3,
    )
    yield _against_peft_boft(results, MEDIUM, 5)


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
    results: Results, group: str, direction: str, peer: str, name: str, most: float
) -> Part | None:
    rounds = _paired(results, group, direction, (peer, name))
    if not rounds:
        return None
    times = [ours / theirs for theirs, ours in rounds]
    return Part("", f"{_quartiles(times, '{:.2f}'.format)} times", [v - most for v in times])


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
