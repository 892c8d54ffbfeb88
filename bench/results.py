"""Results of a run as rows, as CSV, and against the goals."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

from contestants import LORA, PEFT_BOFT, SHAPES, Shape

BOTH = "forward+backward"
OURS = "boft-2-8"  # the one that the goals are about
SPEEDUP_SHAPE = Shape(2048, 2048, 1024)
CSV_FIELDS = (
    *("suite", "shape", "direction", "contestant", "label", "median_ms", "q1_ms", "q3_ms", "ratio"),
    *("ratio_q1", "ratio_q3", "overhead", "saved_bytes", "peak_bytes", "adapter_bytes"),
    *("trainable", "rounds", "note", "dtype", "threads", "backend", "device", "cpu", "python"),
    *("torch", "peft", "triton", "boft_ops", "commit", "dirty", "date"),
)


class Row(NamedTuple):
    """One contestant in one group.

    Attributes:
        suite: "layer" or "ops".
        group: the shape (layer) or the operation (ops).
        by_round: round -> seconds.
        info: the extra_info of the result.
        stats: pytest-benchmark's statistics, seconds.
    """

    suite: str
    group: str
    direction: str
    name: str
    by_round: dict[int, float]
    info: dict
    stats: dict


class Results:
    """A pytest-benchmark JSON file of this folder's benchmarks."""

    def __init__(self, content: dict) -> None:
        self.machine, self.commit = content["machine_info"], content["commit_info"]
        self.date = content["datetime"][:10]
        self.rows = [_row(b) for b in content["benchmarks"]]

    @classmethod
    def load(cls, path: Path) -> Results:
        return cls.load_text(path.read_text())

    @classmethod
    def load_text(cls, text: str) -> Results:
        return cls(json.loads(text))

    @property
    def is_main(self) -> bool:
        """Whether this run is the one that its device's chart shows."""
        return (self.machine["backend"], self.machine["dtype"]) == ("auto", "fp32")

    def groups(self, suite: str) -> list[tuple[str, str]]:
        """(group, direction), in the order of the run."""
        return list(dict.fromkeys((r.group, r.direction) for r in self.rows if r.suite == suite))

    def table(self, group: str, direction: str) -> list[Row]:
        return [r for r in self.rows if (r.group, r.direction) == (group, direction)]

    def find(self, group: str, direction: str, name: str) -> Row | None:
        return next((r for r in self.table(group, direction) if r.name == name), None)

    def write_csv(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, CSV_FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._csv_rows())

    def _csv_rows(self) -> Iterator[dict]:
        common = {k: self.machine[k] for k in CSV_FIELDS if k in self.machine}
        common |= {"commit": self.commit["id"], "dirty": self.commit["dirty"], "date": self.date}
        for row in self.rows:
            info = {k: v for k, v in row.info.items() if k in CSV_FIELDS}
            info = {k: round(v, 6) if isinstance(v, float) else v for k, v in info.items()}
            ms = {f"{k}_ms": round(1e3 * row.stats[k], 6) for k in ("median", "q1", "q3")}
            place = {"suite": row.suite, "shape": row.group, "rounds": len(row.by_round)}
            yield common | info | ms | place


def _row(benchmark: dict) -> Row:
    info = benchmark["extra_info"]
    by_round = dict(zip(info["rounds"], benchmark["stats"]["data"], strict=True))
    key = info["suite"], info["group"], info["direction"], info["contestant"]
    return Row(*key, by_round, info, benchmark["stats"])


class Goal(NamedTuple):
    text: str
    measured: str
    met: bool


def goals(results: Results) -> list[Goal]:
    """The goals that this run can speak about: those whose shapes it measured, all of them."""
    found = []
    shapes = [str(s) for s in SHAPES if results.find(str(s), BOTH, OURS)]
    if len(shapes) == len(SHAPES):
        found.append(_cheaper_than_lora(results, shapes))
    if str(SPEEDUP_SHAPE) in shapes:
        found.append(_faster_than_peft(results, str(SPEEDUP_SHAPE)))
    return found


def _cheaper_than_lora(results: Results, shapes: list[str]) -> Goal:
    parts, n = [], 0
    for shape in shapes:
        ours, lora = (results.find(shape, BOTH, name) for name in (OURS, LORA))
        n += ours.info["overhead"] <= lora.info["overhead"]
        won = [t <= lora.by_round[r] for r, t in ours.by_round.items() if r in lora.by_round]
        parts.append(
            f"{shape}: {ours.info['overhead']:+.1%} against {lora.info['overhead']:+.1%}, "
            f"faster in {sum(won)} of {len(won)} rounds"
        )
    text = f"BOFT(2,8), {BOTH}: overhead <= that of PEFT LoRA r=16 on at least 3 of 4 shapes"
    return Goal(text, f"on {n}: " + "; ".join(parts), n >= 3)


def _faster_than_peft(results: Results, shape: str) -> Goal:
    ours, peft = (results.find(shape, BOTH, name) for name in (OURS, PEFT_BOFT))
    both = ours.by_round.keys() & peft.by_round.keys()
    times = median(peft.by_round[r] / ours.by_round[r] for r in both)
    text = f"BOFT(2,8), {BOTH}: at least 5 times faster than PEFT BOFT at {shape}"
    return Goal(text, f"{times:.1f} times ({peft.info['label']})", times >= 5)
