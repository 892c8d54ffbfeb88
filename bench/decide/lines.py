"""Lines of results.jsonl: one JSON object for each figure, written at once.

Every line has "kind" and "section". The kinds:

    facts      versions, device and clocks
    begun      a part of a section was started
    figure     the times of one contestant, by round
    failed     a part or a contestant that has no figure, with the reason
    section    the outcome of a section

A file that was cut at any byte is read up to its last complete line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from interleave import summary

NAME = "results.jsonl"
DIGITS = 5  # significant digits of a number in a line


class Figure(NamedTuple):
    """A line of the kind "figure".

    Attributes:
        section, part: the contest; figures of one part were measured in turn.
        name: the contestant.
        label: its name for a reader.
        unit: "s", or "1" for a number without a unit.
        by_round: round -> value.
        facts: everything else in the line.
    """

    section: str
    part: str
    name: str
    label: str
    unit: str
    by_round: dict[int, float]
    facts: dict[str, Any]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Median, lower and upper quartile."""
        return summary([*self.by_round.values()])

    def ratios(self, other: Figure) -> list[float]:
        """Values divided by those of another contestant, of each round in which both ran."""
        both = sorted(self.by_round.keys() & other.by_round.keys())
        return [self.by_round[r] / other.by_round[r] for r in both]


class Writer:
    """Appends lines to a file, for one section.

    Args:
        path: the file; it is made if it does not exist.
        section: name of the section.
    """

    def __init__(self, path: Path, section: str) -> None:
        self._path, self._section = path, section

    def write(self, kind: str, **facts: Any) -> None:
        """Append a line by one call of the system, so that lines of two processes never mix."""
        line = json.dumps({"kind": kind, "section": self._section} | facts) + "\n"
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def figure(
        self,
        part: str,
        name: str,
        label: str,
        by_round: dict[int, float],
        unit: str = "s",
        **facts: Any,
    ) -> None:
        """Append the figure of a contestant. The arguments are attributes of ``Figure``."""
        values = [float(f"{by_round[r]:.{DIGITS}g}") for r in sorted(by_round)]
        middle, low, high = (float(f"{q:.{DIGITS}g}") for q in summary(values))
        self.write(
            "figure",
            part=part,
            name=name,
            label=label,
            unit=unit,
            median=middle,
            q1=low,
            q3=high,
            **facts,
            rounds=sorted(by_round),
            values=values,
        )


def read(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a file; what follows the last of them was cut and is left out.

    Raises:
        ValueError: a complete line is not a line of results.
    """
    complete, _, _ = path.read_bytes().rpartition(b"\n")
    lines = []
    for number, text in enumerate(complete.splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected JSON, got {error}") from None
        if not isinstance(line, dict) or not {"kind", "section"} <= line.keys():
            raise ValueError(f"{path}, line {number}: expected kind and section, got {text[:60]}")
        lines.append(line)
    return lines


OWN = {"kind", "section", "part", "name", "label", "unit", "rounds", "values", "median", "q1", "q3"}


def figures(lines: Sequence[dict[str, Any]]) -> list[Figure]:
    """Pick the figures out of lines; of two with the same contest and name the later one counts."""
    found: dict[tuple, Figure] = {}
    for line in lines:
        if line["kind"] != "figure":
            continue
        by_round = dict(zip(line["rounds"], line["values"], strict=True))
        key = line["section"], line["part"], line["name"]
        facts = {name: value for name, value in line.items() if name not in OWN}
        found[key] = Figure(*key, line["label"], line["unit"], by_round, facts)
    return [*found.values()]
