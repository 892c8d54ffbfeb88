"""Verdicts: what the rounds of a measurement say of a bound that was fixed before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from interleave import summary

MET, NOT_MET, UNCLEAR = "met", "not met", "not separable"


class Goal(NamedTuple):
    """A goal, the measurement that decides it, and its verdict, all in words."""

    text: str
    measured: str
    verdict: str


class Part(NamedTuple):
    """A goal in one case, such as one of the shapes that it names.

    Attributes:
        case: name of the case, or "" for a goal that has only one.
        measured: the measurement, in words.
        excess: for each round, the amount beyond the bound; zero or less keeps the bound.
    """

    case: str
    measured: str
    excess: list[float]

    @property
    def verdict(self) -> str:
        """Judge the quartiles of the excess; if zero lies between them, the run cannot tell."""
        _, low, high = summary(self.excess)
        if high <= 0:
            return MET
        return NOT_MET if low > 0 else UNCLEAR

    def __str__(self) -> str:
        kept = sum(e <= 0 for e in self.excess)
        case = f"{self.case} {self.verdict}: " if self.case else ""
        return f"{case}{self.measured}, kept in {kept} of {len(self.excess)} rounds"


def joint_verdict(parts: Sequence[Part], needed: int) -> str:
    """Judge a goal that must be met in ``needed`` of its cases."""
    verdicts = [part.verdict for part in parts]
    if verdicts.count(MET) >= needed:
        return MET
    return NOT_MET if verdicts.count(NOT_MET) > len(parts) - needed else UNCLEAR
