"""Rules with thresholds that were fixed before the measurement, and what each of them decides.

A rule compares contestants of the same part by their ratio in each round. It is met if both
quartiles keep the bound, not met if both are beyond it, and otherwise not separable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from interleave import summary
from judging import MET, NOT_MET, Goal, joint_verdict
from judging import Part as Case

from .lines import Figure

NOT_MEASURED = "not measured"
FASTER = 0.98  # a tile has to come below this part of the default's time, as in the tuner
PROPOSED = "the tuner is to confirm it as the default of such cards"


class Rule(NamedTuple):
    """A rule, and what follows if it is met.

    Attributes:
        text: the rule in words.
        then: what follows from it.
        section: the section of its figures.
        name: the contestant.
        most: bound of the ratio, or of the value itself if there is no peer.
        peer: the contestant that it is compared with; "" for the value itself.
        only: part and facts of a figure -> True if the rule is about it.
    """

    text: str
    then: str
    section: str
    name: str
    most: float
    peer: str = ""
    only: Callable[[str, dict], bool] = lambda part, facts: True


def _part(start: str) -> Callable[[str, dict], bool]:
    return lambda part, facts: part.startswith(start)


def _pass(op: str, sizes: Sequence[int], strided: bool = False) -> Callable[[str, dict], bool]:
    """Choose the passes over rows with groups of these sizes, without those with other tiles."""

    def only(part: str, facts: dict) -> bool:
        right = facts.get("op") == op and facts.get("size") in sizes and "tiles" not in part
        return right and (facts.get("stride", 1) > 1) == strided

    return only


def _op(name: str) -> Callable[[str, dict], bool]:
    return lambda part, facts: facts.get("op") == name and "tiles" not in part


def _newer(only: Callable[[str, dict], bool]) -> Callable[[str, dict], bool]:
    """Leave out figures without a block size: those of earlier C++ kernels have none."""
    return lambda part, facts: only(part, facts) and facts.get("block_size") is not None


BULK = _part("4096x4096x8192")
HOST = "enqueued"
LAYER = "BOFT(2,8), forward and backward"
KERNELS = ("scale", "scale_backward", "cayley")
STAGES = ("stage_from_skew", "stage_from_skew_backward")
RULES = (
    Rule(
        "host time of BOFT(2,8) by C++ at most 0.75 of LoRA's, for each number of rows",
        "the host needs no further work for them; else the layer's Python does",
        "host", "boft-2-8 cuda", 0.75, "lora-r16", _part(HOST),
    ),
    Rule(
        "host time of BOFT(2,8) by Triton at most 0.85 of LoRA's, for each number of rows",
        "Triton's kernels may stay the default where the device is no slower with them",
        "host", "boft-2-8 triton", 0.85, "lora-r16", _part(HOST),
    ),
    Rule(
        "host time of the default BOFT(2,8) at most LoRA's, for each number of rows",
        "small layers are no slower than LoRA's",
        "host", "boft-2-8", 1.0, "lora-r16", _part(HOST),
    ),
    Rule(
        f"loops of BOFT(2,8) in float32 by C++ at most {FASTER} of those of the default, for few "
        "rows and many",
        "layers in float32 make one native call too",
        "host", "boft-2-8 cuda", FASTER, "boft-2-8", _part("loop in float32"),
    ),
    *(
        Rule(
            f"{op} in groups of 16 and 64: C++ at most 1.02 times Triton",
            "C++ becomes the default kernel",
            "kernels", "cuda", 1.02, "triton", _pass(op, (16, 64)),
        )
        for op in ("rotate", "rotate_backward")
    ),
    *(
        Rule(
            f"{op}: C++ at most 1.02 times Triton",
            "C++ becomes the default kernel",
            "kernels", "cuda", 1.02, "triton", _op(op),
        )
        for op in KERNELS
    ),
    *(
        Rule(
            f"{op} at (2,8), of one layer and of all linear layers of Llama-3.1-8B: C++ at most "
            "1.02 times Triton",
            "the C++ kernel stays the default; else Triton's takes its place",
            "kernels", "cuda", 1.02, "triton", _newer(_op(op)),
        )
        for op in STAGES
    ),
    *(
        Rule(
            f"{op} in groups of {' and '.join(map(str, sizes))}: at least {share:.0%} of the rate "
            "of a clone",
            "the default tile stays; else a tile of the tuner, or work on the kernel",
            "kernels", "triton", copies / share, "clone", _pass(op, sizes),
        )
        for op, sizes, copies, share in (
            ("rotate", (16, 64), 1.0, 0.90),
            ("rotate", (128,), 1.0, 0.80),
            ("rotate_backward", (16, 64), 1.5, 0.88),
            ("rotate_backward", (128,), 1.5, 0.80),
        )
    ),
    *(
        Rule(
            f"{op} in groups of 64 that lie apart: C++ at most 1.02 times Triton",
            "C++ becomes the default kernel for them",
            "kernels", "cuda", 1.02, "triton", _newer(_pass(op, (64,), strided=True)),
        )
        for op in ("rotate", "rotate_backward", "rotate_stage_grad")
    ),
    *(
        Rule(
            f"{op} in groups of {size} that lie apart: C++ at most 2.5 clones",
            then,
            "kernels", "cuda", 2.5, "clone", _newer(_pass(op, (size,), strided=True)),
        )
        for op in ("rotate", "rotate_backward")
        for size, then in (
            (32, "they keep the C++ kernel; else that of groups of 64 is extended to them"),
            (64, "the C++ kernel suffices; else it needs further work"),
        )
    ),
    Rule(
        "rotate in groups of 32 and 64 that lie apart: at most 2.5 clones",
        "wide butterflies keep two stages; else a kernel of their own is worth its work",
        "kernels", "triton", 2.5, "clone", _pass("rotate", (32, 64), strided=True),
    ),
    Rule(
        "stages of all linear layers of Llama-3.1-8B at (2,8), by Triton: at most 75 us",
        "Triton makes the stages; else the C++ kernel, if it keeps the bound",
        "kernels", "triton", 75e-6, "", lambda part, facts: (
            facts.get("op") == "stage_from_skew" and facts["features"] > 1 << 20
            and "tiles" not in part
        ),
    ),
    Rule(
        "the same by C++: at most 75 us",
        "C++ makes the stages of a model",
        "kernels", "cuda", 75e-6, "", lambda part, facts: (
            facts.get("op") == "stage_from_skew" and facts["features"] > 1 << 20
            and "tiles" not in part
        ),
    ),
    Rule(
        f"{LAYER} at 4096x4096x8192, device alone: at most 1.20 times the frozen layer",
        "the kernels suffice at that shape",
        "steps", "input side", 1.20, "linear", BULK,
    ),
    Rule(
        f"{LAYER}, no scale, at 4096x4096x8192, device alone: at most 1.10 times the frozen layer",
        "a trained scale is what the rest costs",
        "steps", "weight side, no scale", 1.10, "linear", BULK,
    ),
    Rule(
        "BOFT(10,8), forward and backward at 4096x4096x8192, device alone: at most 1.5 times the "
        "frozen layer",
        "wide butterflies need no kernel of their own",
        "steps", "boft-dense", 1.5, "linear", BULK,
    ),
    Rule(
        "BOFT(10,8), forward and backward at 4096x4096x8192, device alone: three stages by C++ at "
        f"most {FASTER} of two by Triton",
        "wide butterflies get three stages on a GPU, and C++ kernels where they lie apart",
        "steps", "boft-dense in 3 stages", FASTER, "boft-dense", BULK,
    ),
    *(
        Rule(
            f"{layer}, forward and backward at 4096x4096x8192, device alone: the product with W' = "
            f"diag(s) W R^T, {way}, at most {most} of {peer}",
            then,
            "steps", name, most, peer, BULK,
        )
        for layer, way, name, most, peer, then in (
            (
                "BOFT(2,8)", "made in the step", "merged", FASTER, "input side",
                "a GPU rotates W where it moves less (planner.rotates_weight)",
            ),
            (
                "BOFT(2,8)", "made in the step, no scale", "weight side, no scale", FASTER,
                "input side, no scale",
                "a GPU rotates W of layers without scale where it moves less",
            ),
            (
                "BOFT(2,8)", "kept", "merged, kept", 0.90, "input side",
                "the page of layers may say that cache_merged saves time",
            ),
            (
                "BOFT(10,8)", "made in the step", "merged dense", 0.90, "boft-dense",
                "a GPU rotates W in several stages from two rows an output on",
            ),
        )
    ),
    *(
        Rule(
            f"{LAYER}: faster than {peer}, at each shape",
            "the page of benchmarks may say so",
            "layers", "boft-2-8", 1.0, name,
        )
        for name, peer in (
            ("lora-r16", "PEFT LoRA r=16"),
            ("peft-oft", "PEFT OFT (default)"),
            ("peft-boft", "PEFT BOFT"),
        )
    ),
    Rule(
        "a training step of the model: at least as many tokens a second as with LoRA",
        "the page of benchmarks may say so",
        "model", "boft-2-8", 1.0, "lora-r16",
    ),
    *(
        Rule(
            f"cublasLt has an algorithm for a product with the scale as alpha{words}: at most 1.01 "
            "times the plain product",
            "the forward pass of the scale can go into the product: it is built",
            "cublas", f"alpha vector{bias}", 1.01, f"plain{bias}",
        )
        for words, bias in (("", ""), (" and a bias", ", bias"))
    ),
)  # fmt: skip


def judge(figures: Sequence[Figure]) -> Iterator[tuple[Goal, str]]:
    """Yield each rule with its verdict and what follows if it is met."""
    for rule in RULES:
        yield _judge(rule, figures), rule.then
    yield _errors(figures), "these kernels may be used at all"
    yield from _tiles(figures)


def _judge(rule: Rule, figures: Sequence[Figure]) -> Goal:
    cases = []
    for figure in figures:
        key = figure.section, figure.name
        if key != (rule.section, rule.name) or not rule.only(figure.part, figure.facts):
            continue
        values = [*figure.by_round.values()]
        if rule.peer:
            peer = find(figures, figure.section, figure.part, rule.peer)
            values = figure.ratios(peer) if peer else []
        if values:
            cases.append(_case(figure.part, values, rule.most, "times" if rule.peer else "s"))
    return _goal(rule.text, cases)


def _case(part: str, values: Sequence[float], most: float, unit: str) -> Case:
    middle, low, high = (f"{v:.3g}" for v in summary(values))
    return Case(part, f"{middle} [{low}, {high}] {unit}", [v - most for v in values])


def _goal(text: str, cases: Sequence[Case]) -> Goal:
    if not cases:
        return Goal(text, "", NOT_MEASURED)
    return Goal(text, "; ".join(map(str, cases)), joint_verdict(cases, len(cases)))


def _errors(figures: Sequence[Figure]) -> Goal:
    """Judge all kernels at once, and name those with a larger error than allowed."""
    checked = [f for f in figures if f.section == "errors"]
    wrong = [f for f in checked if not max(f.by_round.values()) <= 1]
    text = "the error of each kernel against float64: at most twice that of plain torch"
    if not checked:
        return Goal(text, "", NOT_MEASURED)
    names = ", ".join(f"{f.part} by {f.name}" for f in wrong)
    measured = f"{len(checked) - len(wrong)} of {len(checked)}{f'; not {names}' if wrong else ''}"
    return Goal(text, measured, MET if not wrong else NOT_MET)


def _tiles(figures: Sequence[Figure]) -> Iterator[tuple[Goal, str]]:
    """Yield, for each call with variants of its tile, the best one that was found right."""
    for default in figures:
        key = default.section, default.name
        if key != ("kernels", "triton") or not default.part.endswith(": tiles"):
            continue
        call = default.part.removesuffix(": tiles")
        variants = [
            f for f in figures
            if (f.section, f.part) == ("kernels", default.part) and f.name.startswith("triton ")
        ]  # fmt: skip
        right = [v for v in variants if _is_right(figures, call, v.name)]
        if right:
            best = min(right, key=lambda v: summary(v.ratios(default))[0])
            changes = best.name.removeprefix("triton ")
            text = f"{call}: with {changes} at most {FASTER} of the default"
            case = _case("", best.ratios(default), FASTER, "times")
            yield _goal(text, [case]), PROPOSED


def _is_right(figures: Sequence[Figure], call: str, name: str) -> bool:
    """True if the section of errors has checked a variant and found it right."""
    error = find(figures, "errors", call, name)
    return error is not None and max(error.by_round.values()) <= 1


def find(figures: Sequence[Figure], section: str, part: str, name: str) -> Figure | None:
    """Find the figure of a contestant; None if it was not measured."""
    wanted = section, part, name
    return next((f for f in figures if (f.section, f.part, f.name) == wanted), None)
