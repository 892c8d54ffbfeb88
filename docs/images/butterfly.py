#!/usr/bin/env python3
"""Draw which features each factor of BOFT(2, 8) and BOFT(3, 2) mixes.

python docs/images/butterfly.py    # writes docs/images/butterfly.svg
"""

from __future__ import annotations

from pathlib import Path

import torch

import boft_ops

IMAGE = Path(__file__).with_suffix(".svg")
BUTTERFLIES = ((2, 8), (3, 2))  # (n_factors, block_size)
# Okabe and Ito's palette, whose colors remain distinct with every common form of color blindness.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
PRODUCT = "#555555"  # color of R, in which everything is mixed
WIDTH, SIDE, GAP, MARGIN = 400, 78, 20, 14
TEXT = 'font-family="system-ui, sans-serif" fill="#222222"'


def main() -> None:
    IMAGE.write_text(draw(), encoding="utf-8")


def draw() -> str:
    """Return the picture: a row for each butterfly, its factors and their product R."""
    rows, y = [], MARGIN
    for m, b in BUTTERFLIES:
        rows.append(_row(m, b, y))
        y += SIDE + 74
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y - 4}"'
            f' width="{WIDTH}" height="{y - 4}" role="img">',
            "<title>Features that each factor of BOFT(2, 8) and BOFT(3, 2) mixes</title>",
            f'<rect width="{WIDTH}" height="{y - 4}" rx="6" fill="#ffffff"/>',
            *rows,
            "</svg>\n",
        ]
    )


def patterns(m: int, b: int) -> list[torch.Tensor]:
    """Compute where the factors C_{m-1} ... C_0 are not zero.

    The features are one group of the butterfly, S = b 2^(m-1).

    Returns:
        Boolean matrices (S, S).
    """
    size = b * 2 ** (m - 1)
    eye = torch.eye(b, dtype=torch.float64).expand(m, size // b, b, b)
    result = []
    for i in reversed(range(m)):
        blocks = eye.clone()
        blocks[i] = 1.0
        rows = torch.eye(size, dtype=torch.float64)
        result.append(boft_ops.butterfly_matmul(rows, blocks) != 0)
    return result


def _row(m: int, b: int, y: int) -> str:
    """Draw a line of text, the factors with their names, an equals sign and the product."""
    factors = patterns(m, b)
    size = len(factors[0])
    step = SIDE + GAP
    x = (WIDTH - (m + 1) * step + GAP) / 2
    title = f"BOFT({m}, {b}): {m} factors of {b} × {b} blocks mix {size} features"  # noqa: RUF001
    parts = [_text(WIDTH / 2, y + 12, title, size=12, weight=600)]
    top = y + 24
    for position, pattern in enumerate(factors):
        parts.append(_matrix(x, top, pattern, _colors(pattern)))
        parts.append(_name(x + SIDE / 2, top + SIDE + 16, "C", str(m - 1 - position)))
        sign = "·" if position < m - 1 else "="
        parts.append(_text(x + SIDE + GAP / 2, top + SIDE / 2 + 5, sign, size=18))
        x += step
    everything = torch.ones(size, size, dtype=torch.bool)
    parts.append(_matrix(x, top, everything, [PRODUCT] * size))
    parts.append(_name(x + SIDE / 2, top + SIDE + 16, "R", ""))
    return "\n".join(parts)


def _colors(pattern: torch.Tensor) -> list[str]:
    """Choose a color for each row: rows of one block have one."""
    firsts = pattern.int().argmax(1).tolist()  # the first feature of the block
    blocks = sorted(set(firsts))
    return [COLORS[blocks.index(first)] for first in firsts]


def _matrix(x: float, y: float, pattern: torch.Tensor, colors: list[str]) -> str:
    """Draw a frame with a filled square for each entry that is not zero."""
    cell = SIDE / len(pattern)
    paths = []
    for color in sorted(set(colors)):
        squares = "".join(
            f"M{x + j * cell:g} {y + i * cell:g}h{cell:g}v{cell:g}h-{cell:g}z"
            for i, j in pattern.nonzero().tolist()
            if colors[i] == color
        )
        paths.append(f'<path d="{squares}" fill="{color}" stroke="#ffffff" stroke-width="0.7"/>')
    frame = f'<rect x="{x:g}" y="{y:g}" width="{SIDE}" height="{SIDE}" fill="none"'
    return "\n".join([*paths, frame + ' stroke="#888888"/>'])


def _name(x: float, y: float, letter: str, index: str) -> str:
    below = f'<tspan font-size="11" dy="3">{index}</tspan>'
    return _text(x, y, f'<tspan font-style="italic">{letter}</tspan>{below if index else ""}')


def _text(x: float, y: float, text: str, size: int = 13, weight: int = 400) -> str:
    place = f'x="{x:g}" y="{y:g}" text-anchor="middle"'
    return f'<text {place} font-size="{size}" font-weight="{weight}" {TEXT}>{text}</text>'


if __name__ == "__main__":
    main()
