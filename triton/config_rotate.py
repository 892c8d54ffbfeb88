"""Tiles of the rotate kernels: which for what, and the list of all of them. Imports no torch.

Chosen so that nothing spills on sm_80, sm_90, sm_100 and gfx942; those of halves by times measured
on an H200. float32 is multiplied exactly (no tf32), by ordinary multiply-adds that hold a tile's
whole operands in registers; hence its small tiles. There a stage of 32 is already bound by
arithmetic, and reading x again costs nothing.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from .config import Case

MAX_SIZE = 256
BAND = 16  # the least width of a dot of halves; smaller groups share a band


class Tile(NamedTuple):
    """What one program works on at a time.

    Attributes:
        bands: runs of whole groups in a batched dot; 1: one group, or a part of it, unbatched. At
            least num_warps, as Triton 3.6 repeats the work of a smaller batch.
        rows: rows of x.
        columns: entries of a group in the result; of several groups, whole ones, if they fit.
        inner: entries of a group that are summed over; as many as columns, where those are of
            several groups.
    """

    bands: int
    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


# Per op and kind of dtype, in ascending order: the largest group, and its tile.
TILES = {
    ("rotate", "half"): (
        (32, Tile(1, 64, 64, 64, num_warps=4, num_stages=3)),
        (64, Tile(1, 128, 64, 64, num_warps=8, num_stages=3)),
        (128, Tile(1, 64, 128, 128, num_warps=8, num_stages=3)),
        (256, Tile(1, 64, 128, 256, num_warps=8, num_stages=1)),
    ),
    ("rotate", "float32"): (
        (16, Tile(4, 64, 16, 16, num_warps=4, num_stages=1)),
        (32, Tile(1, 64, 32, 32, num_warps=4, num_stages=2)),
        (256, Tile(1, 64, 64, 16, num_warps=4, num_stages=2)),
    ),
    ("rotate", "float64"): (
        (16, Tile(4, 32, 16, 16, num_warps=4, num_stages=1)),
        (256, Tile(1, 32, 32, 16, num_warps=4, num_stages=2)),
    ),
    # as rotate, but of halves, too, a group is summed over in parts: more addresses are alive here
    ("rotate_indexed", "half"): (
        (16, Tile(4, 64, 16, 16, num_warps=4, num_stages=2)),
        (32, Tile(1, 128, 32, 32, num_warps=4, num_stages=2)),
        (256, Tile(1, 64, 64, 32, num_warps=4, num_stages=2)),
    ),
    ("rotate_indexed", "float32"): (
        (16, Tile(4, 64, 16, 16, num_warps=4, num_stages=1)),
        (32, Tile(1, 32, 32, 32, num_warps=4, num_stages=2)),
        (256, Tile(1, 64, 64, 16, num_warps=4, num_stages=2)),
    ),
    ("rotate_indexed", "float64"): (
        (16, Tile(4, 32, 16, 16, num_warps=4, num_stages=1)),
        (256, Tile(1, 32, 32, 16, num_warps=4, num_stages=2)),
    ),
    # inner must hold a whole group: above these sizes x_grad and Gram are launches of their own
    ("rotate_backward", "half"): (
        (32, Tile(1, 64, 64, 64, num_warps=8, num_stages=3)),
        (64, Tile(1, 64, 64, 64, num_warps=8, num_stages=3)),
        (128, Tile(1, 64, 64, 128, num_warps=8, num_stages=1)),
    ),
    ("rotate_backward", "float32"): (
        (16, Tile(4, 32, 16, 16, num_warps=4, num_stages=1)),
        (32, Tile(1, 32, 32, 32, num_warps=4, num_stages=2)),
        (64, Tile(1, 32, 32, 64, num_warps=8, num_stages=1)),
    ),
    ("rotate_backward", "float64"): (
        (16, Tile(4, 16, 16, 16, num_warps=4, num_stages=1)),
        (32, Tile(1, 16, 32, 32, num_warps=4, num_stages=1)),
    ),
    ("gram", "half"): (
        (32, Tile(1, 64, 64, 64, num_warps=8, num_stages=3)),
        (64, Tile(1, 64, 64, 64, num_warps=4, num_stages=2)),
        (256, Tile(1, 64, 128, 128, num_warps=8, num_stages=2)),
    ),
    ("gram", "float32"): (
        (16, Tile(4, 32, 16, 16, num_warps=4, num_stages=1)),
        (32, Tile(1, 16, 32, 32, num_warps=4, num_stages=2)),
        (256, Tile(1, 16, 64, 32, num_warps=4, num_stages=2)),
    ),
    ("gram", "float64"): (
        (16, Tile(4, 16, 16, 16, num_warps=4, num_stages=1)),
        (256, Tile(1, 16, 32, 32, num_warps=4, num_stages=1)),
    ),
}
# Halves whose chunks lie apart: small groups in bands, as the chunks of neighbouring groups lie
# side by side.
STRIDED = {
    "rotate": (
        (16, Tile(4, 64, 16, 16, num_warps=4, num_stages=2)),
        (32, Tile(4, 32, 32, 32, num_warps=4, num_stages=2)),
    ),
    "rotate_indexed": (
        (16, Tile(4, 64, 16, 16, num_warps=4, num_stages=2)),
        (32, Tile(4, 32, 32, 32, num_warps=4, num_stages=2)),
    ),
    "rotate_backward": (
        (16, Tile(4, 32, 16, 16, num_warps=4, num_stages=3)),
        (32, Tile(4, 16, 32, 32, num_warps=4, num_stages=2)),
        (64, Tile(1, 64, 64, 64, num_warps=8, num_stages=2)),
    ),
    "gram": (
        (16, Tile(4, 32, 16, 16, num_warps=4, num_stages=3)),
        (32, Tile(4, 16, 32, 32, num_warps=4, num_stages=2)),
    ),
}
KINDS = {"bfloat16": "half", "float16": "half", "float32": "float32", "float64": "float64"}
TRITON_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


def supports(size: int) -> bool:
    """Whether the kernels take groups of this size; every dtype of KINDS, chunk and stride."""
    return 1 <= size <= MAX_SIZE


@cache
def config_for(op: str, *, size: int, chunk: int, stride: int, dtype: str) -> Tile | None:
    """The tile of an op ("rotate", "rotate_indexed", "rotate_backward", "gram") for such groups.

    None for a rotate_backward whose groups are too large for one kernel.
    """
    kind = KINDS[dtype]
    tiles = TILES[op, kind]
    if kind == "half" and stride > 1:
        tiles = STRIDED[op] + tiles
    tile = next((tile for most, tile in tiles if size <= most), None)
    # neighbouring features that keep their alignment: below 4, every one needs its own address, and
    # bands that load ahead hold twice as many
    run = chunk if stride > 1 else BAND if BAND % size == 0 else size
    if tile is not None and run % 4:
        stages = 1 if tile.bands > 1 else tile.num_stages
        tile = tile._replace(rows=max(16, tile.rows // 4), num_stages=stages)
    return tile


def reachable(op: str) -> Iterator[tuple[Tile, dict]]:
    """Every tile that config_for can return for this op, with structures that it is for."""
    for dtype, kind in KINDS.items():
        sizes = {most for most, _ in TILES[op, kind]} | {BAND, 2 * BAND}
        for most in sorted(sizes):
            odd = 3 if most == BAND else most - 1
            for size, chunk, stride in ((most, most, 1), (most, 4, 8), (most, 2, 8), (odd, odd, 1)):
                structure = {"size": size, "chunk": chunk, "stride": stride, "dtype": dtype}
                yield config_for(op, **structure), structure


def compile_cases() -> Iterator[Case]:
    """A case per reachable tile and structure; strided ones are transposed.

    For every target the usual structures, in bfloat16 and float32; float16 differs from bfloat16 in
    the names of its instructions.
    """
    for op in ("rotate", "rotate_indexed", "rotate_backward", "gram"):
        for tile, structure in reachable(op):
            if tile is not None:
                yield _case(op, tile, structure)


def _case(op: str, tile: Tile, structure: dict) -> Case:
    dtype = structure["dtype"]
    rows = TRITON_NAMES[dtype]
    sums = "fp64" if dtype == "float64" else "fp32"
    group = {name.upper(): structure[name] for name in ("size", "chunk", "stride")}
    group["TRANSPOSE"] = structure["stride"] > 1
    constants = group | {"INTERPRETED": False} | constants_of(tile)
    if op in ("rotate", "rotate_indexed"):
        pointers = {"x_ptr": rows, "stage_ptr": sums, "y_ptr": rows}
        if op == "rotate_indexed":
            pointers["index_ptr"] = "i32"
    else:
        constants["X_GRAD"] = op == "rotate_backward"
        pointers = {"x_ptr": rows, "grad_ptr": rows, "partials_ptr": sums}
        if op == "rotate_backward":
            pointers |= {"stage_ptr": sums, "x_grad_ptr": rows}
        else:
            constants |= {"stage_ptr": None, "x_grad_ptr": None}
    kernel = {
        "rotate": "rotate:rotate_kernel",
        "rotate_indexed": "rotate_indexed:rotate_indexed_kernel",
    }.get(op, "rotate:rotate_backward_kernel")
    usual = structure["size"] & (structure["size"] - 1) == 0 and structure["chunk"] != 2
    everywhere = usual and dtype in ("bfloat16", "float32")
    return Case(kernel, constants, pointers, tile.num_warps, tile.num_stages, everywhere)


@cache
def constants_of(tile: Tile) -> dict[str, int]:
    """The kernels' constants that a tile sets; num_warps and num_stages are launch options."""
    return {name.upper(): getattr(tile, name) for name in ("bands", "rows", "columns", "inner")}
