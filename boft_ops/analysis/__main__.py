"""Count and draw which features BOFT(M, B) of D features mixes: python -m boft_ops.analysis D B M.

arXiv 2311.06243, section 3, explains the numbers and the graph; so does docs/paper/transmission.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .._runtime import command
from . import graph, transmission
from .transmission import Transmission


def describe(result: Transmission) -> str:
    """Lay out the numbers of a factorization as aligned lines of text."""
    lines = {
        "features d": result.d,
        "factors m": result.m,
        "dense": "yes" if result.dense else "no",
        "non-zeros of the product": f"{result.nonzeros} of {result.d**2}",
        "edges": result.edges,
        "free edges": f"{result.free_edges} ({result.d**2 - result.d} of one dense matrix)",
        "rank": f"{result.d} (orthogonal)",
        "parameters": result.parameters,
        "dimension of the products": result.dimension,
        "all rotations of d features": result.all_rotations,
    }
    if result.forbidden:
        lines["entries that orthogonality forbids"] = result.forbidden
    if result.parameters is None:
        why = f"not computed: more than {transmission.LARGEST} features are connected"
        lines |= {"parameters": why, "dimension of the products": why}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to a parser."""
    parser.add_argument("d", type=int, help="number of features")
    parser.add_argument("b", type=int, nargs="?", help="block_size")
    parser.add_argument("m", type=int, nargs="?", default=1, help="n_factors (default 1: OFT)")
    parser.add_argument(
        "--shuffle",
        action="store_true",
        help="use block-diagonal factors with shuffles between them, not a butterfly",
    )
    parser.add_argument(
        "--edges",
        type=Path,
        metavar="FILE",
        help="read the edges from this file instead of making them from b and m: lines of LEVEL "
        "SOURCE TARGET, counted from 1; the straight edges are always added",
    )
    parser.add_argument(
        "--svg", type=Path, metavar="FILE", help="file for the drawing of the graph"
    )


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Count and draw as the arguments of ``parser`` say; return the exit status."""
    pattern, name = _pattern(args)
    print(describe(transmission.analyze(pattern)))
    if args.svg is None and args.d > graph.MAX_FEATURES:
        return 0
    path = args.svg or Path(f"{name}.svg")
    path.write_text(graph.draw(pattern, name.replace("_", " ")))
    print(f"drawn to {path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status, 0 or 1."""
    return command.main("analysis", __doc__, add_arguments, run, argv)


def _pattern(args: argparse.Namespace) -> tuple[torch.Tensor, str]:
    """Make the pattern that the arguments ask for, and the name of its default SVG file."""
    if args.edges is not None:
        if args.b is not None or args.shuffle:
            raise ValueError("--edges: expected no b, m or --shuffle beside it")
        return transmission.edges_pattern(args.d, _read_edges(args.edges)), args.edges.stem
    if args.b is None:
        raise ValueError("b: expected a block_size, or --edges")
    make = transmission.shuffle_pattern if args.shuffle else transmission.butterfly_pattern
    structure = "shuffle" if args.shuffle else "boft"
    return make(args.d, args.b, args.m), f"{structure}_d{args.d}_b{args.b}_m{args.m}"


def _read_edges(path: Path) -> list[tuple[int, ...]]:
    """Read lines of LEVEL SOURCE TARGET; blank lines and text after a # are skipped."""
    edges = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 3 or not all(word.isdigit() for word in words):
            raise ValueError(f"{path}: line {number}: expected LEVEL SOURCE TARGET, got {line!r}")
        edges.append(tuple(map(int, words)))
    return edges


if __name__ == "__main__":
    sys.exit(main())
