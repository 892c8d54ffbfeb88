"""Tiles of the rotate kernels; each kernel has its table beside it.

A tile is for groups of a size and for devices with enough shared memory. The tiles are such that
nothing spills on any target of tests/data/triton_resources.csv. The tiles of float16 and
bfloat16 were chosen by times measured on an H200. float32 is multiplied exactly (no tf32), by
ordinary multiply-adds that hold the whole operands of a tile in registers; so its tiles are small.
In float32 a stage of 32 is already bound by arithmetic, and reading x again costs nothing. Does not
import triton.
"""

from functools import cache
from typing import NamedTuple

from .limits import Limits

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
        programs: programs of a multiprocessor at a time, by which a kernel that shares out rows by
            itself sizes its grid. 0: the number that a table expects to fit.
    """

    bands: int
    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    programs: int = 0


class Entry(NamedTuple):
    """Tile of a table, with what it is for.

    Attributes:
        size: largest group.
        tile: the tile; its programs, if not 0, are the most that a multiprocessor gets.
        shared: KiB of shared memory that a program takes at most on NVIDIA's GPUs. AMD's hold no
            rows ahead there, and every tile fits their 64 KiB.
        registers: registers of a thread, on an H200 with groups of neighboring features. The
            number of programs that fit follows from both.
        capability: least compute capability, as in ``Limits``.
        rdna: True for AMD's Radeon GPUs alone, where the other tiles spill.
    """

    size: int
    tile: Tile
    shared: int = 40
    registers: int = 128
    capability: int = 0
    rdna: bool = False

    def fits(self, limits: Limits) -> bool:
        """True if a device can run the tile."""
        has_room = limits.is_amd or self.shared << 10 <= limits.program_shared
        able = self.capability <= limits.capability and self.rdna <= limits.is_rdna
        return has_room and able


DTYPE_CLASSES = {"bfloat16": "half", "float16": "half", "float32": "float32", "float64": "float64"}
Entries = tuple[Entry, ...]


class TileTable(NamedTuple):
    """Tiles of one kernel: the defaults, and which others it can run.

    Attributes:
        half, float32, float64: entries by the class of the dtype of the rows. The first one that
            is for the size of the groups and fits the device counts.
        strided: the same for half precision with stride > 1, before ``half``. Small groups go in
            bands, because the chunks of neighboring groups lie side by side.
        whole: dtype classes in which one product has to see a whole group: for a residual product,
            and where the same product gives the gradient of x.
        shares_rows: True if the kernel sizes its grid by ``Tile.programs``, False if its caller
            gives the number of splits.
    """

    half: Entries
    float32: Entries
    float64: Entries
    strided: Entries
    whole: tuple[str, ...]
    shares_rows: bool

    @property
    def type(self) -> type[Tile]:
        """The NamedTuple whose fields a measurement may set."""
        return Tile

    def default(self, structure: dict[str, int], dtype: str, limits: Limits) -> Tile | None:
        """Default tile of the kernel.

        Args:
            structure: size, the features of a group, 1 to MAX_SIZE; chunk, the neighboring features
                of a group; stride, the groups whose chunks alternate (1: a group is contiguous).
            dtype: dtype of the rows, a key of DTYPE_CLASSES.
            limits: those of the device.

        Returns:
            The tile, or None if the groups are too large for the kernel.
        """
        size, chunk, stride = structure["size"], structure["chunk"], structure["stride"]
        dtype_class = DTYPE_CLASSES[dtype]
        entries = getattr(self, dtype_class)
        if dtype_class == "half" and stride > 1:
            entries = self.strided + entries
        entry = next((e for e in entries if size <= e.size and e.fits(limits)), None)
        if entry is None:
            return None
        tile = entry.tile
        if self.shares_rows:
            fit = limits.programs(tile.num_warps, entry.registers, entry.shared << 10)
            tile = tile._replace(programs=min(fit, tile.programs or fit))
        # Neighboring features whose addresses keep their alignment. If 4 do not divide them, every
        # feature needs an address of its own, and bands that load ahead hold twice as many.
        run = chunk if stride > 1 else BAND if BAND % size == 0 else size
        if run % 4:
            num_stages = 1 if tile.bands > 1 or tile.columns == MAX_SIZE else tile.num_stages
            columns = min(tile.columns, MAX_SIZE // 2)
            tile = tile._replace(
                rows=max(16, tile.rows // 4), columns=columns, num_stages=num_stages
            )
        return tile

    def is_legal(self, tile: Tile, structure: dict[str, int], dtype: str) -> bool:
        """True if the kernel can run a tile on such groups and rows."""
        if not (1 <= tile.programs <= 32 if self.shares_rows else tile.programs == 0):
            return False
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

    def smaller(self, tile: Tile, structure: dict[str, int], dtype: str) -> Tile | None:
        """Next tile to try if a device has too little shared memory for this one, or None."""
        for field, value in (
            ("num_stages", tile.num_stages - 1),
            ("rows", tile.rows // 2),
            ("columns", tile.columns // 2),
        ):
            other = tile._replace(**{field: value})
            if value >= 1 and self.is_legal(other, structure, dtype):
                return other
        return None


@cache
def constants_of(tile: Tile) -> dict[str, int]:
    """Constexpr arguments that a tile sets; num_warps and num_stages are launch options."""
    return {name.upper(): getattr(tile, name) for name in ("bands", "rows", "columns", "inner")}
