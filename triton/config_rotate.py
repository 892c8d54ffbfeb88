"""Tiles of the rotate kernels; each kernel has its table beside it.

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
TilesBySize = tuple[tuple[int, Tile], ...]


class TileTable(NamedTuple):
    """Tiles of one kernel: the defaults, and which others it can run.

    Attributes:
        half, float32, float64: by the class of the dtype of the rows, (largest group size, tile) in
            ascending order.
        strided: the same for half precision with stride > 1, before ``half``. Small groups go in
            bands, because the chunks of neighboring groups lie side by side.
        whole: dtype classes in which one product has to see a whole group: for a residual product,
            and where the same product gives the gradient of x.
    """

    half: TilesBySize
    float32: TilesBySize
    float64: TilesBySize
    strided: TilesBySize
    whole: tuple[str, ...]

    @property
    def type(self) -> type[Tile]:
        """The NamedTuple whose fields a measurement may set."""
        return Tile

    def default(self, structure: dict[str, int], dtype: str) -> Tile | None:
        """Default tile of the kernel.

        Args:
            structure: size, the features of a group, 1 to MAX_SIZE; chunk, the neighboring features
                of a group; stride, the groups whose chunks alternate (1: a group is contiguous).
            dtype: dtype of the rows, a key of DTYPE_CLASSES.

        Returns:
            The tile, or None if the groups are too large for the kernel.
        """
        size, chunk, stride = structure["size"], structure["chunk"], structure["stride"]
        dtype_class = DTYPE_CLASSES[dtype]
        tiles = getattr(self, dtype_class)
        if dtype_class == "half" and stride > 1:
            tiles = self.strided + tiles
        tile = next((tile for max_size, tile in tiles if size <= max_size), None)
        # Neighboring features whose addresses keep their alignment. If 4 do not divide them, every
        # feature needs an address of its own, and bands that load ahead hold twice as many.
        run = chunk if stride > 1 else BAND if BAND % size == 0 else size
        if tile is not None and run % 4:
            num_stages = 1 if tile.bands > 1 else tile.num_stages
            tile = tile._replace(rows=max(16, tile.rows // 4), num_stages=num_stages)
        return tile

    def is_legal(self, tile: Tile, structure: dict[str, int], dtype: str) -> bool:
        """True if the kernel can run a tile on such groups and rows."""
        size, dtype_class = structure["size"], DTYPE_CLASSES[dtype]
        padded = max(BAND, 1 << (size - 1).bit_length())
        if tile.num_warps > 16 or tile.rows < 16 or tile.rows > 256:
            return False
        if tile.bands > 1:  # Triton 3.6 repeats the work of a batch smaller than num_warps
            return tile.columns == tile.inner == padded and tile.bands >= tile.num_warps
        if tile.columns >= 2 * size:  # several groups share the tile
            return dtype_class == "half" and size <= 32 and tile.columns == tile.inner <= 128
        if size <= BAND or not BAND <= tile.columns <= padded or not BAND <= tile.inner <= padded:
            return False
        return tile.inner == padded if dtype_class in self.whole else True


@cache
def constants_of(tile: Tile) -> dict[str, int]:
    """Constexpr arguments that a tile sets; num_warps and num_stages are launch options."""
    return {name.upper(): getattr(tile, name) for name in ("bands", "rows", "columns", "inner")}
