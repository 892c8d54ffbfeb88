#!/usr/bin/env python3
"""Count what adapters train in models that people finetune, for the table of choosing.md.

python docs/choosing.py    # rewrites the table of docs/choosing.md from docs/models.csv
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from paper import _page

import boft_ops

PAGE = Path(__file__).with_suffix(".md")
MODELS = PAGE.with_name("models.csv")  # the linear layers that are adapted, by shape
CHOICES = ((2, 8), (4, 4), (1, 32))  # (n_factors, block_size)
RANK = 16  # LoRA's r
# A trained number in float32; in training also its gradient and the two moments of AdamW.
BYTES, COPIES = 4, 4
HEAD = ("model", "targets", "adapter", "features mixed", "trained numbers", "file", "memory")


def main() -> None:
    _page.fill(PAGE, "models", table())


def table() -> list[str]:
    """Make the table: four adapters for each model, LoRA last."""
    with MODELS.open(newline="") as file:
        layers = list(csv.DictReader(file))
    lines = []
    for model, group in groupby(layers, key=lambda layer: layer["model"]):
        rows = list(group)
        words = [model, rows[0]["targets"]]
        for adapter, mixed, numbers in _adapters(rows):
            size = numbers * BYTES
            sizes = f"{size / 1e6:.0f} MB", f"{size * COPIES / 2**20:.0f} MiB"
            lines.append([*words, adapter, mixed, f"{numbers:,}", *sizes])
            words = ["", ""]
    return _page.table(HEAD, lines, n_words=3)


def _adapters(rows: list[dict[str, str]]) -> Iterator[tuple[str, str, int]]:
    """Yield name, features that one group mixes, and trained numbers of each adapter."""
    for m, b in CHOICES:
        name = f"BOFT({m}, {b})" if m > 1 else f"OFT, b = {b}"
        yield name, str(b * 2 ** (m - 1)), sum(trained(row, m, b) for row in rows)
    shapes = [(int(r["inputs"]), int(r["outputs"]), int(r["count"])) for r in rows]
    yield f"LoRA, r = {RANK}", "", sum(RANK * (d + n) * count for d, n, count in shapes)


def trained(row: dict[str, str], m: int, b: int) -> int:
    """Count the numbers of skew and scale in the layers of one shape."""
    d, n = int(row["inputs"]), int(row["outputs"])
    options = {"n_factors": m, "block_size": b, "bias": False, "device": "meta"}
    layer = boft_ops.BOFTLinear(d, n, **options)
    return int(row["count"]) * (layer.skew.numel() + layer.scale.numel())


if __name__ == "__main__":
    main()
