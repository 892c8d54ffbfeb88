"""Write the figures of README.md and docs/ from the committed results.

python bench/page.py            rewrites the tables of all pages, and the charts
python bench/page.py --check    writes nothing; fails if a page differs from the results

A table stands between <!-- table: NAME --> and <!-- end of table -->; BLOCKS has the names.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import chart
import device_tables
import prices
from decide.page import section as decided_section
from environment import ROOT
from sections import NOT_DECIDED, image, no_gpu, section
from store import Machine, load

FOLDER = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


OLDER = (
    "What follows, by `bench/run.py` on the same machine, is older: each part names its commit. "
    "The tables at the top of the page take the figures above where both exist."
)


def results(machines: Sequence[Machine]) -> Iterator[str]:
    """Yield all measurements, machine by machine, each with its goals."""
    if all(machine.on_cpu for machine in machines):
        yield "Not measured on a GPU: all figures are of a CPU."
        yield ""
    for machine in machines:
        if machine.decided:
            yield from decided_section(machine.decided)
            if machine.runs:
                yield ""
                yield OLDER
                yield ""
        for run in machine.runs:
            yield from section(run)
    if all(machine.on_cpu for machine in machines):
        yield no_gpu()
    if not any(machine.decided for machine in machines):
        yield NOT_DECIDED


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
}


def fill(text: str, machines: Sequence[Machine]) -> str:
    """Replace the content of each block of a page.

    Raises:
        ValueError: a block has an unknown name, or no end.
    """

    def new(match: re.Match) -> str:
        start, name, _, end = match.groups()
        if name not in BLOCKS:
            raise ValueError(f"table: expected one of {', '.join(BLOCKS)}, got {name!r}")
        lines = "\n".join(BLOCKS[name](machines)).strip("\n")
        return f"{start}{lines}\n{end}"

    if text.count("<!-- table: ") != len(BLOCK.findall(text)):
        raise ValueError("table: expected <!-- end of table --> after each <!-- table: NAME -->")
    return BLOCK.sub(new, text)


def pages(root: Path) -> list[Path]:
    """List the pages that have blocks."""
    every = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [page for page in every if page.exists() and "<!-- table: " in page.read_text()]


def stale(root: Path, machines: Sequence[Machine]) -> list[Path]:
    """List the pages that do not agree with the results."""
    return [page for page in pages(root) if fill(page.read_text(), machines) != page.read_text()]


def publish(folder: Path, root: Path) -> None:
    """Rewrite the tables of the pages below ``root``, and the charts, from results in a folder."""
    machines = load(folder)
    for page in pages(root):
        page.write_text(fill(page.read_text(), machines))
    for machine in machines:
        if machine.main is not None and machine.main.groups("layer"):
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
