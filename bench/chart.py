"""Bar chart of the time that each adapter adds to a frozen linear layer."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # draws to a file, without a window

import matplotlib.pyplot as plt
from contestants import FLOOR, NAMES, PEFT_BOFT, SMALL_SHAPES, Shape
from operators import BOTH
from results import Results, Row

# Text stays text, in the reader's font; equal data gives equal files.
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "boft_ops", "font.size": 9})

# Okabe and Ito's palette, whose colors remain distinct with every common form of color blindness.
# The bars of other packages are hatched too, so that they remain distinct in gray print.
STYLES = {
    "lora-r16": ("#E69F00", "//"),
    "peft-oft": ("#F0E442", "\\\\"),
    "peft-oft-exact": ("#CC79A7", ".."),
    "peft-oft-32": ("#E8C4DA", ".."),
    "peft-boft": ("#D55E00", "xx"),
    "peft-boft-activation": ("#8C3B00", "xx"),
    "peft-psoft": ("#B8A800", "--"),
    "more": ("#7F5F00", "||"),
    "compiled-boft": ("#999999", "++"),
    "lycoris-boft": ("#BBBBBB", "oo"),
    "oft-8": ("#A9D8F5", ""),
    "oft-32": ("#D6ECFA", ""),
    "boft-1-16": ("#56B4E9", ""),
    "boft-2-8": ("#0072B2", ""),
    "boft-4-4": ("#003A5C", ""),
    "boft-dense": ("#009E73", ""),
}
WIDTH = 0.8  # width of a group of bars; groups are 1 apart


def draw(path: Path, results: Results) -> None:
    """Draw the overhead of forward + backward over the frozen layer, one group of bars a shape."""
    groups = [g for g, direction in results.groups("layer") if direction == BOTH]
    groups = [g for g in groups if Shape.parse(g) not in SMALL_SHAPES]  # they have a table
    measured = {row.name for row in results.rows if row.suite == "layer"}
    names = [name for name in NAMES if name in measured - {FLOOR}]
    top = _axis_end(results, groups)
    fig, axes = plt.subplots(figsize=(7.6, 5), layout="constrained")
    for center, group in enumerate(groups):
        rows = [row for row in results.table(group, BOTH) if row.name != FLOOR]
        _bars(axes, rows, center, WIDTH / len(names), top)
    axes.set_xticks(range(len(groups)), [_title(g) for g in groups])
    axes.set_ylim(min(0, axes.get_ylim()[0]), top)
    axes.yaxis.set_major_formatter("{x:.0f} %")
    axes.set_ylabel("time added to the frozen nn.Linear")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    machine = results.machine
    axes.set_title(
        f"Forward + backward of one layer, {machine['dtype']}, {_device(machine)}\n"
        "lower is better; whiskers are quartiles",
        fontsize=10,
        pad=18,  # leaves room for the numbers above bars that are cut off
    )
    handles, labels = axes.get_legend_handles_labels()
    bars = dict(zip(labels, handles, strict=True))  # one bar for each label, not one a shape
    look = {"ncols": 3, "fontsize": 9, "frameon": False}
    fig.legend(bars.values(), bars.keys(), loc="outside lower center", **look)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(fig, path)


def save(fig, path: Path) -> None:
    """Save a figure without a date, as its format names it, and close it."""
    fig.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(fig)


def _bars(axes, rows: list[Row], center: int, width: float, top: float) -> None:
    """Draw the bars of one shape side by side around ``center``."""
    for i, row in enumerate(rows):
        x = center + (i - (len(rows) - 1) / 2) * width
        value, low, high = (100 * (row.info[k] - 1) for k in ("ratio", "ratio_q1", "ratio_q3"))
        color, hatch = STYLES[row.name]
        look = {"color": color, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}
        axes.bar(x, min(value, top), width, label=row.info["label"], **look)
        if value > top:  # the bar is cut off, so its value is written above it
            axes.annotate(
                f"{value:.0f} %",
                (x, top),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                annotation_clip=False,
            )
        else:
            error = [[value - low], [min(high, top) - value]]
            axes.errorbar(x, value, error, color="black", linewidth=0.9, capsize=2)


def _axis_end(results: Results, groups: list[str]) -> float:
    """End of the axis in percent, chosen without PEFT's BOFT, which would dwarf all other bars."""
    rows = [r for g in groups for r in results.table(g, BOTH) if r.name != PEFT_BOFT]
    return 1.1 * max(100 * max(r.info["ratio_q3"] - 1, 0.01) for r in rows)


def _title(group: str) -> str:
    d, n, tokens = group.split("x")
    return f"{d} → {n}\n{tokens} tokens"


def _device(machine: dict) -> str:
    return f"{machine['threads']} CPU threads" if machine["device"] == "cpu" else machine["device"]
