#!/usr/bin/env python3
"""Roofline plot of the operators from committed results: flops per byte against flop/s.

python bench/roofline.py    # draws docs/images/roofline_cpu.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import chart
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from operators import BACKWARD, BOTH
from results import Results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "amd-epyc-zen-4" / "auto.json"
IMAGE = ROOT / "docs" / "images" / "roofline_cpu.svg"
# Contestant -> color (of Okabe and Ito's palette), marker and label.
LOOKS = {
    "cayley": ("#009E73", "^", "Cayley transform"),
    "rotate-1-16": ("#56B4E9", "o", "rotation, BOFT(1,16)"),
    "rotate-2-8": ("#0072B2", "s", "rotation, BOFT(2,8)"),
    "rotate-4-4": ("#003A5C", "D", "rotation, BOFT(4,4)"),
    "boft-linear": ("#D55E00", "P", "whole layer"),
    "f-linear": ("#767676", "x", "frozen product (BLAS)"),
    "grad-weight": ("#767676", "x", ""),
}


def points(results: Results) -> list[tuple[str, str, float, float]]:
    """List (name, direction, flops per byte, flops per second at the median) of all operators."""
    operators = []
    for group, direction in results.groups("ops"):
        if direction == BOTH:
            continue  # forward and backward are listed separately
        for row in results.table(group, direction):
            if row.name in LOOKS and row.info.get("flops"):
                rate = row.info["flops"] / row.stats["median"]
                operators.append((row.name, direction, row.info["flops"] / row.info["bytes"], rate))
    return operators


def draw(path: Path, results: Results) -> None:
    """Draw the operators below the roof, which a copy and a matrix product of the run determine.

    Raises:
        ValueError: the run did not measure a copy and a matrix product.
    """
    rates = results.rates()
    if rates is None:
        raise ValueError("results: expected a run that measured a copy and a matrix product")
    fig, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    operators = points(results)
    span = np.geomspace(0.5 * min(p[2] for p in operators), 2 * max(p[2] for p in operators), 200)
    roof = np.minimum(rates.bytes * span, rates.flops)
    axes.plot(span, roof / 1e9, color="black", lw=1.5)
    note = f"{rates.bytes / 1e9:.0f} GB/s copied, {rates.flops / 1e9:.0f} GFLOP/s in a product"
    axes.text(span[-1], 0.93 * rates.flops / 1e9, note, ha="right", va="top")
    for name, direction, intensity, rate in operators:
        color, marker, label = LOOKS[name]
        backward = direction == BACKWARD
        fill = {"markerfacecolor": "white"} if backward and marker != "x" else {}
        label = "" if backward else label
        axes.plot(intensity, rate / 1e9, marker, color=color, label=label or None, ms=7, **fill)
    axes.set(xscale="log", yscale="log", xlabel="flops per byte that must move", ylabel="GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):  # 5, 10, 20, 50 instead of powers of ten
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="hollow: backward", loc="lower right")
    machine = results.machine
    title = f"Operators on a CPU, {machine['dtype']}, {machine['threads']} threads"
    fig.suptitle(title, fontsize=11)
    chart.save(fig, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="result file to read")
    parser.add_argument("--out", type=Path, default=IMAGE, help="image file to write")
    args = parser.parse_args()
    draw(args.out, Results.load(args.results))


if __name__ == "__main__":
    main()
