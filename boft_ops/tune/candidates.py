"""Tiles worth a try for a Triton kernel: those within a few steps of its default."""

from __future__ import annotations

from collections import deque

from .._runtime.backend import Op

STAGES = (1, 2, 3, 4)  # values of num_stages
TileFields = tuple[tuple[str, int], ...]


def tiles(op: Op, structure: dict[str, int], dtype: str) -> list[TileFields]:
    """Every tile but the default itself, nearest first; none if the kernel has none to set.

    A step halves or doubles one field, or changes num_stages. Two steps reach what was fastest on
    an H200 from each default; kernels with two free fields get three.
    """
    table = op.tiles()
    default = None if table is None else table.default(structure, dtype)
    if default is None:
        return []
    most = 2 if len(default) > 4 else 3
    steps = {default: 0}
    queue = deque([default])
    while queue:
        tile = queue.popleft()
        if steps[tile] == most:
            continue
        for field, value in tile._asdict().items():
            nearby = STAGES if field == "num_stages" else (value // 2, value * 2)
            for other in nearby:
                neighbor = tile._replace(**{field: other})
                if other >= 1 and neighbor not in steps:
                    steps[neighbor] = steps[tile] + 1
                    queue.append(neighbor)
    del steps[default]
    return [
        tuple(tile._asdict().items()) for tile in steps if table.is_legal(tile, structure, dtype)
    ]
