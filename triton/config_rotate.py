"""Tiles of the rotate kernels: the default for each group size, dtype and layout.

The tiles are such that nothing spills on sm_80, sm_90, sm_100 and gfx942. The tiles of float16 and
bfloat16 were chosen by times measured on an H200. float32 is multiplied exactly (no tf32), by
ordinary multiply-adds that hold the whole operands of a tile in registers; so its tiles are small.
In float32 a stage of 32 is already bound by arithmetic, and reading x again costs nothing. Imports
neither torch nor triton.
"""

from functools import cache
from typing import NamedTuple

MAX_SIZE = 256  # largest group
BAND = 16  # least width of a dot product in half precision; smaller groups share a band


class Tile(NamedTuple):
    """Part of the work that one program of a rotate kernel does at a time.

    Attributes:
        bands: bands in one batched dot product; a band is a run of whole groups. 1: one
            unbatched product, of a group or a part of it. Other values are at least num_warps,
            because Triton 3.6 repeats the work of a smaller batch.
        rows: rows of x.
        columns: entries of a group in the result. A tile of several groups holds whole ones.
        inner: entries of a group that are summed over. Equal to columns in a tile of several
            groups.
        num_warps: warps per program.
        num_stages: stages of software pipelining.
    """

    bands: int
    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


DTYPE_CLASSES = {"bfloat16": "half", "float16": "half", "float32": "float32", "float64": "float64"}
# (op, dtype class) -> (largest group size, tile), in ascending order.
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
    # Half precision, too, sums over a group in parts here, unlike rotate: this kernel keeps more
    # addresses in registers.
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
    # inner must hold a whole group. Larger groups have no tile: the gradients of x and of the stage
    # take a launch each.
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
# Half precision with stride > 1, before TILES. Small groups go in bands, because the chunks of
# neighboring groups lie side by side.
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


@cache
def config_for(op: str, *, size: int, chunk: int, stride: int, dtype: str) -> Tile | None:
    """Default tile of an op.

    Args:
        op: "rotate", "rotate_indexed", "rotate_backward" or "gram".
        size: features of a group, 1 to MAX_SIZE.
        chunk: neighboring features of a group.
        stride: groups whose chunks alternate; 1 if a group is contiguous.
        dtype: dtype of the rows, a key of DTYPE_CLASSES.

    Returns:
        The tile. None for "rotate_backward" if the groups are too large for one kernel.
    """
    dtype_class = DTYPE_CLASSES[dtype]
    tiles = TILES[op, dtype_class]
    if dtype_class == "half" and stride > 1:
        tiles = STRIDED[op] + tiles
    tile = next((tile for max_size, tile in tiles if size <= max_size), None)
    # Neighboring features whose addresses keep their alignment. If 4 do not divide them, every
    # feature needs an address of its own, and bands that load ahead hold twice as many addresses.
    run = chunk if stride > 1 else BAND if BAND % size == 0 else size
    if tile is not None and run % 4:
        num_stages = 1 if tile.bands > 1 else tile.num_stages
        tile = tile._replace(rows=max(16, tile.rows // 4), num_stages=num_stages)
    return tile


def default_tile(op: str, structure: dict[str, int], dtype: str) -> Tile | None:
    """Default tile by the numbers of an op's shape class, None as for ``config_for``; for the tuner."""
    return config_for(op, **structure, dtype=dtype)


def is_legal(op: str, tile: Tile, structure: dict[str, int], dtype: str) -> bool:
    """True if the kernel of an op can run a tile on such groups and rows."""
    size, half = structure["size"], DTYPE_CLASSES[dtype] == "half"
    padded = max(BAND, 1 << (size - 1).bit_length())
    if tile.num_warps > 16 or tile.rows < 16 or tile.rows > 256:
        return False
    if tile.bands > 1:  # Triton 3.6 repeats the work of a batch smaller than num_warps
        return tile.columns == tile.inner == padded and tile.bands >= tile.num_warps
    if tile.columns >= 2 * size:  # several groups share the tile
        return half and size <= 32 and tile.columns == tile.inner <= 128
    if size <= BAND or not BAND <= tile.columns <= padded or not BAND <= tile.inner <= padded:
        return False
    # One product must see the whole group: of halves, and to give the gradient of x as well.
    whole = (half and op == "rotate") or op == "rotate_backward"
    return tile.inner == padded if whole else True


@cache
def constants_of(tile: Tile) -> dict[str, int]:
    """Constexpr arguments that a tile sets; num_warps and num_stages are launch options."""
    return {name.upper(): getattr(tile, name) for name in ("bands", "rows", "columns", "inner")}
