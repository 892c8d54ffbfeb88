"""Results of a run as rows, with the floors of its operators, and as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from operators import FORWARD
from sizes import sizes_on

CSV_FIELDS = (
    *("suite", "shape", "direction", "contestant", "label", "median_ms", "q1_ms", "q3_ms", "ratio"),
    *("ratio_q1", "ratio_q3", "overhead", "saved_bytes", "peak_bytes", "adapter_bytes"),
    *(
        "trainable",
        "tokens_per_s",
        "bytes",
        "flops",
        "floor_ms",
        "rounds",
        "note",
        "dtype",
        "threads",
        "backend",
    ),
    *("device", "cpu", "python", "torch", "peft", "triton", "boft_ops", "commit", "dirty", "date"),
)


class Row(NamedTuple):
    """One contestant in one group.

    Attributes:
        suite: "layer", "ops" or "model".
        group: the shape (layer), the operation (ops) or the model.
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


class Floor(NamedTuple):
    """The least time that an operator can take.

    Attributes:
        seconds: at the rates that the same run measured.
        by: what it comes from, "bytes" or "flops".
    """

    seconds: float
    by: str


class Rates(NamedTuple):
    """The best that a run saw: bytes per second of a copy, flops per second of a matrix product."""

    bytes: float
    flops: float


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
        dtype = "fp32" if self.machine["device"] == "cpu" else "bf16"
        return (self.machine["backend"], self.machine["dtype"]) == ("auto", dtype)

    def groups(self, suite: str) -> list[tuple[str, str]]:
        """(group, direction), in the order of the run."""
        return list(dict.fromkeys((r.group, r.direction) for r in self.rows if r.suite == suite))

    def table(self, group: str, direction: str) -> list[Row]:
        return [r for r in self.rows if (r.group, r.direction) == (group, direction)]

    def left_out(self) -> dict[str, list[str]]:
        """Shape -> labels of the contestants that needed more memory than the device has."""
        labels = {r.name: r.info["label"] for r in self.rows}
        names = {r.group: r.info["left_out"] for r in self.rows if "left_out" in r.info}
        return {group: [labels.get(n, n) for n in left_out] for group, left_out in names.items()}

    def find(self, group: str, direction: str, name: str) -> Row | None:
        return next((r for r in self.table(group, direction) if r.name == name), None)

    def rates(self) -> Rates | None:
        """Of x.clone() and of torch.mm; None if the run has not measured both."""
        sizes = sizes_on(self.machine["device"])
        copy = self.find(sizes.rotation, FORWARD, "clone")
        product = self.find(sizes.product, FORWARD, "mm")
        if copy is None or product is None:
            return None
        return Rates(
            copy.info["bytes"] / min(copy.by_round.values()),
            product.info["flops"] / min(product.by_round.values()),
        )

    def floor(self, row: Row) -> Floor | None:
        """Of a row with bytes and flops, in a run that measured its rates."""
        rates = self.rates()
        if rates is None or "flops" not in row.info:
            return None
        floors = [Floor(row.info[k] / getattr(rates, k), k) for k in ("bytes", "flops")]
        return max(floors)

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
            floor = self.floor(row)
            if floor is not None:
                ms["floor_ms"] = round(1e3 * floor.seconds, 6)
            yield common | info | ms | place


def _row(benchmark: dict) -> Row:
    info = benchmark["extra_info"]
    by_round = dict(zip(info["rounds"], benchmark["stats"]["data"], strict=True))
    key = info["suite"], info["group"], info["direction"], info["contestant"]
    return Row(*key, by_round, info, benchmark["stats"])
