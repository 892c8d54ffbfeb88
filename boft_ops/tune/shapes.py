"""The linear layers of known models."""

from __future__ import annotations

import json
from pathlib import Path

from .makers import Shape

# (inputs, outputs) of each kind of adapted linear layer
NAMED = {
    "llama-2-7b": ((4096, 4096), (4096, 11008), (11008, 4096)),
    "llama-3-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
    "deberta-v3-base": ((768, 768), (768, 3072), (3072, 768)),
    "dinov2-large": ((1024, 1024), (1024, 4096), (4096, 1024)),
    "sd-1.5": ((320, 320), (640, 640), (1280, 1280), (768, 320), (768, 640), (768, 1280)),
}


def shapes_of(text: str, rows: int) -> list[Shape]:
    """From comma-separated names, DxNxROWS and files; names get ``rows`` rows.

    Raises:
        ValueError: a part is none of them.
    """
    found: list[Shape] = []
    for part in text.split(","):
        if part in NAMED:
            found += [Shape(d, n, rows) for d, n in NAMED[part]]
        elif Path(part).is_file():
            found += [_shape(item, part) for item in _items(part)]
        else:
            try:
                numbers: object = [int(number) for number in part.split("x")]
            except ValueError:
                numbers = part
            found.append(_shape(numbers, text))
    return list(dict.fromkeys(found))


def _items(path: str) -> list:
    try:
        items = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"shapes: expected JSON in {path!r}: {error}") from None
    if not isinstance(items, list):
        raise ValueError(f"shapes: expected a list of [d, n, rows], got {items!r} in {path!r}")
    return items


def _shape(numbers: object, where: str) -> Shape:
    is_list = isinstance(numbers, list) and len(numbers) == 3
    if not is_list or not all(type(number) is int for number in numbers):
        known = ", ".join(NAMED)
        raise ValueError(
            f"shapes: expected {known}, DxNxROWS or a JSON file of [d, n, rows], got {numbers!r} "
            f"in {where!r}"
        )
    if min(numbers) < 1:
        raise ValueError(f"shapes: expected positive numbers, got {numbers!r} in {where!r}")
    return Shape(*numbers)
