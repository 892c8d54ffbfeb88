"""Section 3 of the paper: factorizations as graphs, their edges, and their dimensions.

python docs/paper/transmission.py
python docs/paper/transmission.py --quick --out build/paper/transmission
"""

from pathlib import Path

import torch
from _common import HERE, OUTPUTS, Clock, output_folder, parser, read_csv, write_csv, write_log
from _page import fill, table

from boft_ops.analysis import graph
from boft_ops.analysis.transmission import (
    analyze,
    butterfly_pattern,
    edges_pattern,
    product,
    shuffle_pattern,
)

# The paper shows the edges of Figure 2 only as a picture. These edges have the properties that its
# text states: d = 4, m = 5, ten free edges, dense; without the last factor node 1 does not reach
# node 3.
FIGURE_2 = [(1, 2), (3, 4), (2, 4), (1, 4), (2, 3)]
DATA = "transmission.csv"


def figure_2() -> torch.Tensor:
    """Make the pattern of Figure 2."""
    swaps = enumerate(FIGURE_2, 1)
    return edges_pattern(4, [(i, *edge) for i, (j, k) in swaps for edge in ((j, k), (k, j))])


def structures(quick: bool) -> dict[str, torch.Tensor]:
    """Make the patterns to analyze, by name."""
    patterns = {
        "one dense matrix, d = 4": torch.ones(1, 4, 4, dtype=torch.bool),
        "five exchanges (Figure 2), d = 4": figure_2(),
        "butterfly, d = 4": butterfly_pattern(4, 2, 2),
        "block-diagonal (Figure 3), d = 4": butterfly_pattern(4, 2, 1),
        "butterfly (Figure 4), d = 8": butterfly_pattern(8, 2, 3),
    }
    d = 16 if quick else 64
    for b in (2, 4, 8) if quick else (2, 4, 8, 16):
        for m in range(1, (d // b).bit_length() + 1):
            patterns[f"BOFT({m}, {b}), d = {d}"] = butterfly_pattern(d, b, m)
            if m > 1 and b > 2:
                patterns[f"shuffle({m}, {b}), d = {d}"] = shuffle_pattern(d, b, m)
    return patterns


def check_claims(folder: Path) -> list[str]:
    """Check the paper's counts of free edges, and state each.

    Raises:
        AssertionError: a count differs from the paper's.
    """
    rows = {row["structure"]: row for row in read_csv(folder / DATA)}
    counts = {
        "one dense matrix, d = 4": "12",
        "five exchanges (Figure 2), d = 4": "10",
        "butterfly, d = 4": "8",
    }
    lines = []
    for name, free in counts.items():
        row = rows[name]
        if row["free_edges"] != free or row["dense"] != "True":
            raise AssertionError(f"{name}: the paper has {free} free edges, dense; got {row}")
        lines.append(f"{name}: {free} free edges, dense: as in the paper")
    if product(figure_2()[:4])[2, 0]:
        raise AssertionError("Figure 2: B4 B3 B2 B1 should have a zero at (3, 1)")
    return lines


def structure_table(folder: Path) -> list[str]:
    """Make the page's table of all structures."""
    rows = []
    for row in read_csv(folder / DATA):
        dense = "yes" if row["dense"] == "True" else "no"
        numbers = (row["parameters"], row["dimension"])
        rows.append([row["structure"], row["free_edges"], dense, *numbers])
    return table(["", "free edges", "dense", "parameters", "dimension"], rows)


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__).parse_args(argv)
    folder, clock = output_folder(args), Clock()
    rows = []
    for name, pattern in structures(args.quick).items():
        result = analyze(pattern)
        rows.append({"structure": name, **result._asdict(), "dense": result.dense})
    write_csv(folder / DATA, rows)
    figures = {
        "figure2.svg": (figure_2(), "d = 4, m = 5, ten free edges"),
        "figure3.svg": (butterfly_pattern(4, 2, 1), "OFT, d = 4, b = 2"),
        "figure4.svg": (butterfly_pattern(8, 2, 3), "BOFT(3, 2), d = 8"),
    }
    for file, (pattern, title) in figures.items():
        (folder / file).write_text(graph.draw(pattern, title))
    write_log(folder / "transmission.log", clock)
    print("\n".join(check_claims(folder)))
    if folder == OUTPUTS:
        fill(HERE / "transmission.md", "structures", structure_table(folder))


if __name__ == "__main__":
    main()
