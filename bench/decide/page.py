"""Part of the page of benchmarks that shows a run of gpu_decide.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from judging import MET

from .lines import figures
from .table import cells
from .verdicts import NOT_MEASURED, PROPOSED, judge

FILE = "decide.jsonl"  # the lines of a run, among the committed results of its device
KERNELS = "kernels"  # the section of single kernels
TILES = ": tiles"  # end of the parts that are too many for the page


def environment_of(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the facts of device and software.

    Raises:
        ValueError: the lines have none.
    """
    for line in lines:
        if (line["kind"], line.get("part")) == ("facts", "environment"):
            return line
    raise ValueError("lines: expected the facts of a device, got none")


def commit_of(lines: Sequence[dict[str, Any]], section: str) -> str:
    """Name the commit that measured a section, which may have been run later than others."""
    for line in lines:
        if (line["kind"], line["section"]) == ("section", section) and "commit" in line:
            return line["commit"][:9]
    return (environment_of(lines)["commit"]["id"] or "unknown")[:9]


def section(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of Markdown for one run."""
    facts, found = environment_of(lines), figures(lines)
    yield f"### {facts['device'].upper()}: what gpu_decide.py measured"
    yield ""
    sections = list(dict.fromkeys(figure.section for figure in found))
    commits = ", ".join(f"{name} {commit_of(lines, name)}" for name in sections)
    versions = ", ".join(f"{k} {facts[k]}" for k in ("torch", "triton", "peft", "python"))
    yield f"{facts['device']}; host {facts['cpu']}. {versions}. Commits: {commits}."
    yield ""
    for goal, then in judge(found):
        if then == PROPOSED:  # docs/kernels.md shows the fastest tile of each kernel
            continue
        verdict = goal.verdict if goal.verdict == MET else f"**{goal.verdict}**"
        measured = f" Measured: {goal.measured}." if goal.measured else ""
        follows = f" If met: {then}." if goal.verdict != NOT_MEASURED else ""
        yield f"- {verdict}: {goal.text}.{measured}{follows}"
    yield ""
    yield (
        "The times of single kernels are in [How the kernels work](kernels.md#on-an-h200) and "
        "[CUDA C++](cuda.md#on-a-gpu)."
    )
    yield ""
    yield "| | us [quartiles] | x first | rate |"
    yield "|---|--:|--:|--:|"
    for figure in found:
        if figure.section == KERNELS or figure.unit != "s":
            continue
        label, value, ratio, rate = cells(figure, found)
        yield f"| {figure.section}, {figure.part}: {label} | {value} | {ratio} | {rate} |"
    yield ""
