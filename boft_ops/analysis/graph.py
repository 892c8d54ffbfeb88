"""SVG drawings of a factorization as a graph of levels (figures 2 to 4 of arXiv 2311.06243)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .transmission import product

MAX_FEATURES = 64  # a drawing of more is illegible

# Colors of edges from a node to itself, of other edges, of a matrix's entries, and of the rest.
STRAIGHT = "#b0b0b0"
FREE = "#0072B2"
ENTRY = "#0072B2"
ZERO = "#f0f0f0"
TEXT = "#222222"

LEFT, TOP = 34, 34  # margins, in pixels
WIDTH = 110  # distance between two levels, in pixels


def draw(pattern: torch.Tensor, title: str = "") -> str:
    """Draw the graph, and below it the pattern of each factor and of each product B_i ... B_1.

    Args:
        pattern: (m, d, d), boolean, B_1 first, with d <= 64.
        title: a line above the graph. The default is none.

    Returns:
        The text of an SVG file.

    Raises:
        ValueError: there are more than 64 features.
    """
    m, d, _ = pattern.shape
    if d > MAX_FEATURES:
        raise ValueError(f"pattern: expected at most {MAX_FEATURES} features to draw, got {d}")
    pitch = max(9, min(26, 420 // d))
    radius = min(6.0, 0.3 * pitch)
    bottom = TOP + pitch * (d - 1) + 30
    cell = max(1.2, min(14.0, 84 / d))
    side = cell * d
    parts = [_text(LEFT - 20, 13, title, 12)] if title else []
    parts += [*_edges(pattern, pitch), *_nodes(m, d, pitch, radius)]
    parts += _patterns(pattern, bottom, cell)
    width, height = 2 * LEFT + m * WIDTH, bottom + (2 * side + 36 if m > 1 else side + 10)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" '
        f'width="{width}" height="{height:.0f}" font-family="sans-serif">\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _edges(pattern: torch.Tensor, pitch: int) -> Iterator[str]:
    """Yield a line for each edge; ``pitch`` is the distance between two nodes of a level."""
    for i, factor in enumerate(pattern):
        for target, source in factor.nonzero().tolist():
            color, width = (STRAIGHT, 1) if target == source else (FREE, 1.4)
            ends = (LEFT + i * WIDTH, TOP + source * pitch, LEFT + (i + 1) * WIDTH)
            yield (
                f'<line x1="{ends[0]}" y1="{ends[1]}" x2="{ends[2]}" y2="{TOP + target * pitch}" '
                f'stroke="{color}" stroke-width="{width}"/>'
            )


def _nodes(m: int, d: int, pitch: int, radius: float) -> Iterator[str]:
    """Yield the levels' names, the nodes, and the numbers of those of the first level."""
    for i in range(m + 1):
        x = LEFT + i * WIDTH
        yield _text(x, TOP - 11, f"level {i + 1}", 10.5, "middle")
        for node in range(d):
            y = TOP + node * pitch
            yield f'<circle cx="{x}" cy="{y}" r="{radius:.1f}" fill="white" stroke="{TEXT}"/>'
            if i == 0:
                yield _text(x - 12, y + 3, str(node + 1), min(10.5, pitch), "end")


def _patterns(pattern: torch.Tensor, top: float, cell: float) -> Iterator[str]:
    """Yield the grids of the factors, and below them those of the products."""
    side = cell * pattern.shape[1]
    so_far = torch.eye(pattern.shape[1], dtype=torch.bool)
    for i, factor in enumerate(pattern):
        so_far = product(torch.stack([so_far, factor]))
        x = LEFT + (i + 0.5) * WIDTH - side / 2
        yield from _grid(factor, x, top, cell, f"B{i + 1}")
        if i:
            name = f"B{i + 1}...B1" if i > 1 else "B2 B1"
            yield from _grid(so_far, x, top + side + 26, cell, name)


def _grid(matrix: torch.Tensor, x: float, y: float, cell: float, name: str) -> list[str]:
    """Draw a boolean matrix as a grid of cells, with its name above."""
    side = cell * len(matrix)
    parts = [_text(x + side / 2, y - 5, name, 10.5, "middle")]
    parts.append(
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" fill="{ZERO}" '
        f'stroke="{TEXT}" stroke-width="0.6"/>'
    )
    for row, column in matrix.nonzero().tolist():
        parts.append(
            f'<rect x="{x + column * cell:.1f}" y="{y + row * cell:.1f}" width="{cell:.2f}" '
            f'height="{cell:.2f}" fill="{ENTRY}" stroke="white" stroke-width="{cell / 20:.2f}"/>'
        )
    return parts


def _text(x: float, y: float, text: str, size: float, anchor: str = "start") -> str:
    """Make a text element, with the characters that XML reserves escaped."""
    safe = text.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{TEXT}" '
        f'text-anchor="{anchor}">{safe}</text>'
    )
