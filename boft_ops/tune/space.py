"""Tiles worth a try for each Triton kernel, with what the cost model says of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from .cost import Resources, seconds
from .machine import Machine

FAR = 0.01  # of the modelled time for each octave away from the default: what decides ties
OF_ROWS = ("rotate", "rotate_indexed", "rotate_backward", "gram")
PACKED = (32, 64, 128)  # columns of a two-dimensional tile that several groups share
Tiles = list[tuple[float, dict[str, int]]]  # modelled seconds, fields of the config


def tiles(
    op: str, structure: dict[str, int], sizes: dict[str, int], dtype: str, machine: Machine
) -> Tiles:
    """All candidates for an operator's Triton kernel but the default; none if it has no choice."""
    if op in OF_ROWS:
        return list(_of_rows(op, structure, sizes, dtype, machine))
    if op in ("scale", "scale_backward"):
        return list(_of_scale(op, sizes, dtype, machine))
    if op in ("cayley", "cayley_backward", "stage_from_skew", "stage_from_skew_backward"):
        return [(0.0, config) for config in _of_blocks(op, structure)]
    return []  # compose and the rest


def default_of(op: str, structure: dict[str, int], dtype: str) -> dict[str, int] | None:
    """The fields of the config that serves where nothing was measured; None if there is none."""
    config = _default(op, structure, dtype)
    return None if config is None else config._asdict()


def _default(op: str, structure: dict[str, int], dtype: str) -> Any:
    from ..triton_kernels import config, config_rotate, config_scale

    if op in OF_ROWS:
        return config_rotate.config_for(op, **structure, dtype=dtype)
    if op in ("scale", "scale_backward"):
        return config_scale.config_for(op)
    if op in ("cayley", "cayley_backward"):
        return config.config_for(op, b=structure["block_size"])
    if op in ("stage_from_skew", "stage_from_skew_backward"):
        return config.config_for(op, m=structure["n_factors"], b=structure["block_size"])
    return None


def _of_rows(
    op: str, structure: dict[str, int], sizes: dict[str, int], dtype: str, machine: Machine
) -> Iterator[tuple[float, dict[str, int]]]:
    default = _default(op, structure, dtype)
    if default is None:  # its groups are too large for one kernel
        return
    size, half = structure["size"], dtype in ("bfloat16", "float16")
    padded = max(16, 1 << (size - 1).bit_length())
    shapes = []  # (bands, columns, inner)
    if size <= 16 or default.bands > 1:
        shapes += [(bands, padded, padded) for bands in (2, 4, 8)]
    if half and size <= 32:
        shapes += [(1, width, width) for width in PACKED if width >= 2 * size]
    if size > 16:
        widths = [w for w in (16, 32, 64, 128, 256) if w <= padded]
        # inner must hold a whole group of halves, and of whatever gives the gradient of x as well
        whole = (half and op == "rotate") or op == "rotate_backward"
        inners = [padded] if whole else [w for w in widths if w >= min(16, padded)]
        shapes += [(1, columns, inner) for columns in widths[-3:] for inner in inners[-3:]]
    rows = [r for r in (16, 32, 64, 128, 256) if r <= max(16, 2 * sizes["rows"])]
    near = {True: default, False: default}  # by whether a tile packs groups
    if default.columns < 2 * size or default.bands > 1:
        # what was best on an H200
        warps = 8 if op == "rotate_backward" else 4
        near[True] = default._replace(
            bands=1, rows=64, columns=64, inner=64, num_warps=warps, num_stages=3
        )
    for (bands, columns, inner), n_rows in itertools.product(shapes, rows):
        for num_warps, num_stages in itertools.product((1, 2, 4, 8), (1, 2, 3, 4)):
            if 1 < bands < num_warps:  # Triton 3.6 would repeat the work
                continue
            tile = default._replace(
                bands=bands, rows=n_rows, columns=columns, inner=inner,
                num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
            if tile != default:
                packs = bands == 1 and columns >= 2 * size
                modelled = _seconds_of_rows(op, tile, structure, sizes, dtype, machine)
                yield modelled * (1 + FAR * _octaves(tile, near[packs])), tile._asdict()


def _seconds_of_rows(op, tile, structure, sizes, dtype, machine: Machine) -> float:
    width = {"float64": 8, "float32": 4}.get(dtype, 2)
    wide = max(4, width)
    size, rows, d = structure["size"], sizes["rows"], sizes["features"]
    threads = 32 * tile.num_warps
    left, right = tile.rows * tile.columns * tile.bands, tile.rows * tile.inner * tile.bands
    matrix = tile.columns * tile.inner * tile.bands
    both = op in ("rotate_backward", "gram")
    loaded = width * (right + left * both)
    numbers = matrix * wide / 4 if both else left * wide / 4  # what is summed up
    if op == "rotate_backward":
        numbers += left * wide / 4
    # As compiled for sm_90: what was loaded and half of what stays are held too, twice that by
    # multiply-adds of float32, and some 40 beside the tiles.
    numbers += (loaded / 4 + matrix * width / 8) * (1 if width == 2 else 2)
    registers = int(numbers / threads) + 40
    shared = tile.num_stages * loaded + matrix * width * (op != "gram")
    used = Resources(shared, registers, tile.num_stages * loaded, tile.num_warps)
    n_tiles = math.ceil(d / (tile.bands * max(size, tile.columns // size * size)))
    n_tiles *= math.ceil(size / tile.columns) * (math.ceil(size / tile.inner) if both else 1)
    programs = n_tiles * math.ceil(rows / tile.rows)
    # a group in several columns is read as often, once from memory and then from the cache
    reads = 1 + (math.ceil(size / tile.columns) - 1) / 4
    arrays = (2 if op == "rotate_backward" else 1) + reads
    # the zeros between packed groups are multiplied too
    flops = 2 * rows * d * max(size, tile.inner) * (2 if op == "rotate_backward" else 1)
    return seconds(used, programs, arrays * rows * d * width, flops, dtype, machine)


def _octaves(tile: Any, default: Any) -> float:
    """How far a tile is from the default, which was chosen by what compilers make of it."""
    pairs = zip(tile, default, strict=True)
    return sum(abs(math.log2(one / other)) for one, other in pairs)


def _of_scale(
    op: str, sizes: dict[str, int], dtype: str, machine: Machine
) -> Iterator[tuple[float, dict[str, int]]]:
    default = _default(op, {}, dtype)
    width = {"float64": 8, "float32": 4}.get(dtype, 2)
    both = op == "scale_backward"
    n_bytes = (3 if both else 2) * sizes["rows"] * sizes["features"] * width
    shapes = itertools.product((4, 8, 16, 32), (128, 256, 512, 1024), (2, 4, 8))
    for rows, columns, num_warps in shapes:
        tile = default._replace(ROWS=rows, COLUMNS=columns, num_warps=num_warps)
        loaded = (2 if both else 1) * rows * columns * width
        numbers = (4 if both else 1) * rows * columns
        registers = numbers * max(4, width) // 4 // (32 * num_warps) + 40
        used = Resources(0, registers, loaded, num_warps)
        row_tiles = math.ceil(sizes["rows"] / rows)
        programs = math.ceil(sizes["features"] / columns) * row_tiles
        if both:
            programs = min(programs, max(1056, math.ceil(sizes["features"] / columns)))
        if tile != default:
            modelled = seconds(used, programs, n_bytes, 0, dtype, machine)
            yield modelled * (1 + FAR * _octaves(tile, default)), tile._asdict()


def _of_blocks(op: str, structure: dict[str, int]) -> Iterator[dict[str, int]]:
    """Fewer and more blocks in a program, on fewer and more warps: all of it is tiny."""
    default = _default(op, structure, "")
    for factor, num_warps in itertools.product((0.5, 1, 2, 4, 8, 16, 32), (1, 2, 4, 8)):
        G = int(default.G * factor)
        if G < 1:
            continue
        tile = default._replace(G=G, num_warps=num_warps)
        held, most_held = G * default.B**2, 128
        if op.startswith("stage_from_skew"):
            most_held = 32
            most = G << (structure["n_factors"] - 1)
            tile = tile._replace(C=min(most, default.C))
            held = tile.C * default.B**2
        # Numbers of a tile for each thread, two tiles in registers. For rotation it is two of
        # float64; cayley's were best with 32 on an H200, and more are tried.
        if tile != default and held <= most_held * 32 * num_warps:
            yield tile._asdict()
