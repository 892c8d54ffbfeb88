"""The table of all figures and the verdicts, made from lines alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from interleave import summary

from .lines import Figure, figures
from .verdicts import NOT_MEASURED, find, judge

UNITS = {"host": ", us of the host", "device": ", us of the device", "both": ", us"}


def text(lines: Sequence[dict[str, Any]]) -> str:
    """Format all figures, then what failed, then the verdicts."""
    found = figures(lines)
    return "\n".join([*_figures(found), "", *_outcomes(lines), "", "VERDICTS", *_verdicts(found)])


def _figures(found: Sequence[Figure]) -> Iterator[str]:
    contest = None
    for figure in found:
        if contest != (contest := (figure.section, figure.part)):
            yield f"\n{figure.section}: {figure.part}{UNITS.get(figure.facts.get('clock'), '')}"
        label, value, ratio, rate = cells(figure, found)
        yield f"  {label:<52.52} {value:>28} {ratio:>7} {rate:>12}"


def cells(figure: Figure, found: Sequence[Figure]) -> tuple[str, str, str, str]:
    """Return label, time with quartiles, ratio to the first contestant, and the rate if any."""
    middle, low, high = figure.quartiles
    if figure.unit == "1":
        facts = figure.facts
        value = f"{middle:.3f} of allowed"
        return figure.label, value, "", f"{facts['error']:.1e}" if "error" in facts else ""
    n = figure.facts.get("launches", 1)
    middle_us, low_us, high_us = (f"{1e6 * v / n:.4g}" for v in (middle, low, high))
    first = find(found, figure.section, figure.part, figure.facts.get("first", figure.name))
    ratio = f"{summary(figure.ratios(first))[0]:.3f}" if first and figure.ratios(first) else ""
    return figure.label, f"{middle_us} [{low_us}, {high_us}]", ratio, _rate(figure, middle)


def _rate(figure: Figure, seconds: float) -> str:
    for key, scale, unit in (("bytes", 1e9, "GB/s"), ("flops", 1e12, "TFLOP/s")):
        if key in figure.facts:
            return f"{figure.facts[key] / seconds / scale:.4g} {unit}"
    return f"{figure.facts['tokens'] / seconds:.4g} tok/s" if "tokens" in figure.facts else ""


def _outcomes(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    for line in lines:
        if line["kind"] == "failed":
            yield f"  failed: {line['section']}, {line['part']} {line['name']}: {line['why']}"
        elif "outcome" in line:
            name = line.get("part", line["section"])
            yield f"  {name}: {line['outcome']}, {line['seconds']} s"


def _verdicts(found: Sequence[Figure]) -> Iterator[str]:
    for goal, then in judge(found):
        measured = f" ({goal.measured})" if goal.measured else ""
        yield f"  {goal.verdict}: {goal.text}{measured}"
        if goal.verdict != NOT_MEASURED:
            yield f"      if met: {then}"
