"""Write tables and figures of README.md and docs/ from the committed results.

python bench/page.py            rewrites tables and figures of all pages, and the charts
python bench/page.py --check    writes nothing; fails if a page differs from the results

A table stands between <!-- table: NAME --> and <!-- end of table -->; BLOCKS has the names.
A figure in a sentence stands between <!-- figure: NAME --> and <!-- /figure --> (figures.py).
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import chart
import device_tables
import figures
import prices
from decide.page import section as decided_section
from environment import ROOT
from sections import NOT_DECIDED, image, memory, no_gpu, section, table
from store import Machine, load

FOLDER = ROOT / "bench" / "results"
MARK = re.compile("<!-- (table|figure): ")
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def results(machines: Sequence[Machine]) -> Iterator[str]:
    """Yield all measurements, machine by machine, each with its goals."""
    if all(machine.on_cpu for machine in machines):
        yield "Not measured on a GPU: all figures are of a CPU."
        yield ""
    for machine in machines:
        if machine.decided:
            yield from decided_section(machine.decided)
        for run in machine.runs:
            yield from memory(run) if machine.decided else section(run)
    if all(machine.on_cpu for machine in machines):
        yield no_gpu()
    if not any(machine.decided for machine in machines):
        yield NOT_DECIDED


def learning_rates(machines: Sequence[Machine]) -> Iterator[str]:
    """Yield the validation accuracies of the demo's search: methods in rows, rates in columns."""
    text = (ROOT / "docs" / "examples" / "rates.csv").read_text()
    found: dict[str, dict[float, float]] = {}
    for row in csv.DictReader(line for line in text.splitlines() if not line.startswith("#")):
        found.setdefault(row["method"], {})[float(row["rate"])] = float(row["accuracy"])
    rates = sorted({rate for by_rate in found.values() for rate in by_rate})
    rows = []
    for method, by_rate in found.items():
        best = max(by_rate.values())
        cells = {rate: f"{a:.1f}" if a < best else f"**{a:.1f}**" for rate, a in by_rate.items()}
        rows.append([method, *(cells.get(rate, "") for rate in rates)])
    yield from table(["rate", *(f"{rate:g}" for rate in rates)], rows)


Block = Callable[[Sequence[Machine]], Iterator[str]]
BLOCKS: dict[str, Block] = {
    "price": prices.price,
    "shapes": prices.shapes,
    "headline": prices.headline,
    "wins": prices.wins,
    "results": results,
    "pure-install": prices.pure_install,
    "upstream": prices.upstream,
    "peft-model": prices.peft_model,
    "by-rows": prices.by_rows,
    "kernels-on-a-gpu": device_tables.kernels,
    "cuda-and-triton": device_tables.sides,
    "steps-on-a-gpu": device_tables.steps,
    "learning-rates": learning_rates,
}


def fill(text: str, machines: Sequence[Machine]) -> str:
    """Replace the content of each block and each figure of a page.

    Raises:
        ValueError: a block or a figure has an unknown name, or no end.
    """

    def new(match: re.Match) -> str:
        start, name, _, end = match.groups()
        if name not in BLOCKS:
            raise ValueError(f"table: expected one of {', '.join(BLOCKS)}, got {name!r}")
        lines = "\n".join(BLOCKS[name](machines)).strip("\n")
        return f"{start}{lines}\n{end}"

    if text.count("<!-- table: ") != len(BLOCK.findall(text)):
        raise ValueError("table: expected <!-- end of table --> after each <!-- table: NAME -->")
    return figures.fill(BLOCK.sub(new, text), machines)


def pages(root: Path) -> list[Path]:
    """List the pages that have blocks or figures."""
    every = [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    every += sorted((root / "docs").rglob("*.md"))
    return [page for page in every if page.exists() and MARK.search(page.read_text())]


def filled(page: Path, machines: Sequence[Machine]) -> str:
    """Return the text of a page as the results give it.

    Raises:
        ValueError: a block or a figure of the page cannot be made.
    """
    try:
        return fill(page.read_text(), machines)
    except ValueError as error:
        raise ValueError(f"{page.name}: {error}") from None


def stale(root: Path, machines: Sequence[Machine]) -> list[Path]:
    """List the pages that do not agree with the results."""
    return [page for page in pages(root) if filled(page, machines) != page.read_text()]


def publish(folder: Path, root: Path) -> None:
    """Rewrite the pages below ``root``, and the charts, from the results in a folder."""
    machines = load(folder)
    for page in pages(root):
        page.write_text(filled(page, machines))
    for machine in machines:
        if machine.main is not None and machine.main.groups("layer") and not machine.decided:
            chart.draw(root / "docs" / image(machine.main), machine.main)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    if not parser.parse_args(argv).check:
        publish(FOLDER, ROOT)
    elif different := stale(ROOT, load(FOLDER)):
        names = ", ".join(str(page.relative_to(ROOT)) for page in different)
        sys.exit(f"{names}: not what bench/results gives; run python bench/page.py")


if __name__ == "__main__":
    main()
