"""The goals of the project, and the verdict of a run on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from contestants import BULK, FLOOR, LORA, PEFT_BOFT, SHAPES, Shape
from interleave import summary
from judging import Goal, Part, joint_verdict
from operators import BACKWARD, BOTH, FORWARD
from results import Results
from sizes import CPU, GPU

OURS = "boft-2-8"  # the contestant of most goals
MEDIUM, LARGE = Shape(2048, 2048, 1024), Shape(4096, 4096, 512)


def goals(results: Results) -> list[Goal]:
    """Judge the goals of a run's backend for which the run measured everything that they need."""
    machine = results.machine
    sources = {"auto": [_with_kernels], "reference": [_in_plain_torch]}.get(machine["backend"], [])
    if machine["device"] != "cpu" and (machine["backend"], machine["dtype"]) == ("auto", "bf16"):
        sources.append(_on_gpu)
    judged = []
    for text, parts, needed in chain.from_iterable(source(results) for source in sources):
        if None not in parts:
            judged.append(Goal(text, "; ".join(map(str, parts)), joint_verdict(parts, needed)))
    return judged


def gpu_goals() -> list[str]:
    """List the texts of the goals that only a run on a GPU can judge."""
    empty = Results({"machine_info": {}, "commit_info": {}, "datetime": "", "benchmarks": []})
    return [text for text, _, _ in _on_gpu(empty)]


# Text of a goal, its cases (None if not measured), and the number of cases that must meet it.
Candidate = tuple[str, list[Part | None], int]


def _with_kernels(results: Results) -> Iterator[Candidate]:
    """Yield the goals of a run with the package's kernels on a CPU or GPU."""
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
    for peer, variant in (("peft-oft", "default"), ("peft-oft-exact", "exact")):
        yield (
            f"{layer}: faster than PEFT OFT ({variant}), at each shape",
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
    """Yield the goals of a run without kernels."""
    yield (
        f"BOFT(2,8), {BOTH}: overhead at most that of PEFT LoRA r=16 on at least 3 of 4 shapes",
        [_overhead(results, shape, OURS, 1.0) for shape in SHAPES],
        3,
    )
    yield _against_peft_boft(results, MEDIUM, 5)


SMALL_GROUPS = {16: "rotate-2-8", 64: "rotate-4-8"}  # features mixed -> contestant
LARGE_GROUPS = {256: "rotate-6-8", GPU.features: "rotate-10-8"}


def _on_gpu(results: Results) -> Iterator[Candidate]:
    """Yield the goals of a run in bfloat16, with enough rows to keep a GPU busy."""
    # A copy and a rotation move two arrays; a backward with the Gram matrices moves three.
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
    # A block takes 28 numbers in and 64 out. 3.35 TB/s is the bandwidth in the H100's data sheet.
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
    """Compare the overhead of ``name`` with a share of LoRA's overhead.

    An overhead is divided by the time of the frozen layer.
    """
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
    """Compare the speed of ``name``, relative to a peer's, with the least speedup.

    ``alone`` means that the goal has no other case.
    """
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
    case: str = "",
) -> Part | None:
    """Compare the time of ``name``, divided by a peer's time, with the largest allowed ratio."""
    rounds = _paired(results, group, direction, (peer, name))
    if not rounds:
        return None
    times = [ours / theirs for theirs, ours in rounds]
    return Part(case, f"{_quartiles(times, '{:.2f}'.format)} times", [v - most for v in times])


def _duration(results: Results, group: str, name: str, most: float) -> Part | None:
    """Compare the time of ``name`` with the largest allowed number of seconds."""
    times = [t for (t,) in _paired(results, group, FORWARD, (name,))]
    if not times:
        return None
    measured = _quartiles(times, lambda seconds: f"{1e6 * seconds:.1f}")
    return Part("", f"{measured} µs", [t - most for t in times])


def _paired(
    results: Results, group: str, direction: str, names: Sequence[str]
) -> list[tuple[float, ...]]:
    """List the times of several contestants, for each round in which all of them ran."""
    rows = [results.find(group, direction, name) for name in names]
    if None in rows:
        return []
    rounds = sorted(set.intersection(*(set(row.by_round) for row in rows)))
    return [tuple(row.by_round[r] for row in rows) for r in rounds]


def _quartiles(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Format the median and, in brackets, the quartiles."""
    middle, low, high = map(show, summary(values))
    return f"{middle} [{low}, {high}]"
