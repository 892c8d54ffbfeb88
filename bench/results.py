"""Results of a run: its rows, the floors of its operators, and CSV output."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from operators import FORWARD
from sizes import sizes_on

CSV_FIELDS = (
    "suite",
    "shape",
    "direction",
    "contestant",
    "label",
    "median_ms",
    "q1_ms",
    "q3_ms",
    "ratio",
    "ratio_q1",
    "ratio_q3",
    "overhead",
    "saved_bytes",
    "peak_bytes",
    "adapter_bytes",
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
    "device",
    "cpu",
    "python",
    "torch",
    "peft",
    "triton",
    "boft_ops",
    "commit",
    "dirty",
    "date",
)


class Row(NamedTuple):
    """One contestant in one group.

    Attributes:
        suite: "layer", "ops" or "model".
        group: the shape, the operation or the model, depending on the suite.
        direction: "forward", "backward", "forward+backward" or "training step".
        name: name of the contestant.
        by_round: seconds, by number of the round.
        info: the extra_info of the result.
        stats: pytest-benchmark's statistics, in seconds.
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
        seconds: the time at the rates that the same run measured.
        by: the quantity that determines it, "bytes" or "flops".
    """

    seconds: float
    by: str


class Rates(NamedTuple):
    """Best rates of a run: bytes per second of a copy, flops per second of a matrix product."""

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
        """Read a result file."""
        return cls.load_text(path.read_text())

    @classmethod
    def load_text(cls, text: str) -> Results:
        """Read the text of a result file."""
        return cls(json.loads(text))

    @property
    def is_main(self) -> bool:
        """True if the chart of the device shows this run."""
        dtype = "fp32" if self.machine["device"] == "cpu" else "bf16"
        return (self.machine["backend"], self.machine["dtype"]) == ("auto", dtype)

    def groups(self, suite: str) -> list[tuple[str, str]]:
        """List the groups of a suite with their directions, in the order of the run."""
        return list(dict.fromkeys((r.group, r.direction) for r in self.rows if r.suite == suite))

    def table(self, group: str, direction: str) -> list[Row]:
        """List the rows of a group and direction."""
        return [r for r in self.rows if (r.group, r.direction) == (group, direction)]

    def left_out(self) -> dict[str, list[str]]:
        """List, by shape, the labels of the contestants that ran out of memory."""
        labels = {r.name: r.info["label"] for r in self.rows}
        names = {r.group: r.info["left_out"] for r in self.rows if "left_out" in r.info}
        return {group: [labels.get(n, n) for n in left_out] for group, left_out in names.items()}

    def find(self, group: str, direction: str, name: str) -> Row | None:
        """Find the row of a contestant; None if it was not measured."""
        return next((r for r in self.table(group, direction) if r.name == name), None)

    def rates(self) -> Rates | None:
        """Compute the rates of x.clone() and torch.mm; None if the run did not measure both."""
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
        """Compute the floor of a row; None if its work or the rates of the run are unknown."""
        rates = self.rates()
        if rates is None or "flops" not in row.info:
            return None
        floors = [Floor(row.info[k] / getattr(rates, k), k) for k in ("bytes", "flops")]
        return max(floors)

    def write_csv(self, path: Path) -> None:
        """Write all rows as a CSV file."""
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
            keys = {"suite": row.suite, "shape": row.group, "rounds": len(row.by_round)}
            floor = self.floor(row)
            if floor is not None:
                ms["floor_ms"] = round(1e3 * floor.seconds, 6)
            yield common | info | ms | keys


def text_of(content: dict[str, Any]) -> str:
    """Write what ``Results`` reads of pytest-benchmark's output, one line for each contestant."""
    kept = {key: content[key] for key in ("machine_info", "commit_info", "datetime")}
    lines = []
    for benchmark in content["benchmarks"]:
        stats = {key: benchmark["stats"][key] for key in ("median", "q1", "q3", "data")}
        lines.append(json.dumps({"extra_info": benchmark["extra_info"], "stats": stats}))
    head = json.dumps(kept, indent=1).removesuffix("\n}")
    return head + ',\n "benchmarks": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def _row(benchmark: dict) -> Row:
    info = benchmark["extra_info"]
    by_round = dict(zip(info["rounds"], benchmark["stats"]["data"], strict=True))
    key = info["suite"], info["group"], info["direction"], info["contestant"]
    return Row(*key, by_round, info, benchmark["stats"])
