"""python -m boft_ops.analysis D B M: what BOFT(M, B) of D features mixes: numbers and a graph."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import graph, transmission
from .transmission import Transmission

PROG = f"python -m {__package__}"


def describe(found: Transmission) -> str:
    """The report as lines of text."""
    lines = {
        "features d": found.d,
        "factors m": found.m,
        "dense": "yes" if found.dense else "no",
        "non-zeros of the product": f"{found.nonzeros} of {found.d**2}",
        "edges": found.edges,
        "free edges": f"{found.free_edges} ({found.d**2 - found.d} of one dense matrix)",
        "rank": f"{found.d} (orthogonal)",
        "parameters": found.parameters,
        "dimension of the products": found.dimension,
        "all rotations of d features": found.all_rotations,
    }
    if found.forbidden:
        lines["entries that orthogonality forbids"] = found.forbidden
    if found.parameters is None:
        why = f"not computed: more than {transmission.LARGEST} features are connected"
        lines |= {"parameters": why, "dimension of the products": why}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__)
    parser.add_argument("d", type=int, help="features")
    parser.add_argument("b", type=int, nargs="?", help="block_size")
    parser.add_argument("m", type=int, nargs="?", default=1, help="n_factors (default 1: OFT)")
    parser.add_argument(
        "--shuffle", action="store_true", help="block-diagonal factors with shuffles between them"
    )
    parser.add_argument(
        "--edges",
        type=Path,
        metavar="FILE",
        help="instead of b and m: lines of LEVEL SOURCE TARGET, counted from 1; the straight edges "
        "are there anyway",
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="where to draw the graph")
    args = parser.parse_args(argv)
    try:
        pattern, name = _pattern(args)
        print(describe(transmission.analyse(pattern)))
        if args.svg is None and args.d > graph.MAX_FEATURES:
            return 0
        path = args.svg or Path(f"{name}.svg")
        path.write_text(graph.draw(pattern, name.replace("_", " ")))
        print(f"drawn to {path}")
    except (ValueError, OSError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _pattern(args: argparse.Namespace) -> tuple[torch.Tensor, str]:
    if args.edges is not None:
        if args.b is not None or args.shuffle:
            raise ValueError("--edges: expected no b, m or --shuffle beside it")
        return transmission.edges_pattern(args.d, _read_edges(args.edges)), args.edges.stem
    if args.b is None:
        raise ValueError("b: expected a block_size, or --edges")
    make = transmission.shuffle_pattern if args.shuffle else transmission.butterfly_pattern
    kind = "shuffle" if args.shuffle else "boft"
    return make(args.d, args.b, args.m), f"{kind}_d{args.d}_b{args.b}_m{args.m}"


def _read_edges(path: Path) -> list[tuple[int, ...]]:
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
