"""Index arithmetic and tile operations of the rotate kernels: where the groups of a stage lie.

The entries of all groups, one group after the other, have *positions* 0..d-1: position
g * SIZE + i is entry i of group g. A program owns a run of positions, or several runs ("bands").
All index arithmetic starts at positions: which feature lies there, which positions share a group.
Groups of fewer than 16 entries are packed into a band, a block-diagonal matrix of 16 x 16, because
a tensor core multiplies no less; all bands are one batched dot product. A larger group takes
two-dimensional products of its own, in tiles if it needs them, or is a band of its own.

Tiles of rows are [rows, positions] if BANDS == 1, else [rows, BANDS, width], so that neighboring
threads read neighboring bands. The batched dot product wants the bands first.

Arguments that the functions share: SIZE, features of a group; CHUNK, neighboring features of a
group; STRIDE, groups whose chunks alternate (1: a group is contiguous); W, width of a band; BANDS,
bands per program; TRANSPOSE, True for transposed matrices; INTERPRETED, True in the interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def rows_axis(index, BANDS: tl.constexpr):
    """Reshape an index of rows for a tile of rows."""
    return index[:, None] if BANDS == 1 else index[:, None, None]


@triton.jit
def inner_axis(index, BANDS: tl.constexpr):
    """Reshape an index for the inner axis of a [inner, columns] or [BANDS, inner, columns] tile."""
    return index[:, None] if BANDS == 1 else index[:, :, None]


@triton.jit
def columns_axis(index, BANDS: tl.constexpr):
    """Reshape an index for the columns of a [inner, columns] or [BANDS, inner, columns] tile."""
    return index[None, :] if BANDS == 1 else index[:, None, :]


@triton.jit
def program(d, SIZE: tl.constexpr, PARTS: tl.constexpr, W: tl.constexpr, BANDS: tl.constexpr):
    """Work of this program: its group (or bands), part of the group, and range of rows.

    Neighboring programs take neighboring columns, so that they read rows together.

    Args:
        d: features of a row.
        PARTS: tiles that a group is cut into.

    Returns:
        Number of the group or of the bands, number of the part, number of the range of rows.
    """
    width: tl.constexpr = BANDS * (W // SIZE * SIZE if W >= SIZE else SIZE)
    n_tiles = (d + width - 1) // width * PARTS
    tile = tl.program_id(0) % n_tiles
    turn = (tl.program_id(0) // n_tiles).to(tl.int64)
    return tile // PARTS, tile % PARTS, turn


@triton.jit
def positions(tile, offset, d, SIZE: tl.constexpr, W: tl.constexpr, BANDS: tl.constexpr):
    """Positions of a program's runs, and the mask of those that exist.

    A band holds as many whole groups as fit. A run in a larger group begins ``offset`` entries into
    it.

    Args:
        tile: number of the group or of the bands, from ``program``.
        offset: first entry in the group; 0 for several groups.
        d: features of a row.

    Returns:
        Positions and mask, [W] if BANDS == 1, else [BANDS, W].
    """
    lane = offset + tl.arange(0, W)
    if BANDS == 1 and W < 2 * SIZE:
        position = tile * SIZE + lane
        inside = lane < SIZE
    else:
        step: tl.constexpr = W // SIZE * SIZE
        if BANDS == 1:
            position = tile * step + lane
        else:
            position = (tile * BANDS + tl.arange(0, BANDS)[:, None]) * step + lane[None, :]
        inside = position < d
        if step < W:
            inside = inside & (lane < step if BANDS == 1 else (lane < step)[None, :])
    return position, inside


@triton.jit
def same_group(inner, column, inside, SIZE: tl.constexpr, W: tl.constexpr):
    """Mask of the existing entries of a tile of the stage whose row and column share a group."""
    if W >= 2 * SIZE:  # otherwise a band has only one group
        inside = inside & (inner // SIZE == column // SIZE)
    return inside


@triton.jit
def feature_at(position, SIZE: tl.constexpr, CHUNK: tl.constexpr, STRIDE: tl.constexpr):
    """Feature at a position: entry (c, e) of group (h, l) is feature ((h, c), l, e)."""
    if STRIDE == 1:
        feature = position
    else:
        group = position // SIZE
        chunk = (group // STRIDE) * (SIZE // CHUNK) + position % SIZE // CHUNK
        feature = (chunk * STRIDE + group % STRIDE) * CHUNK + position % CHUNK
    return feature


@triton.jit
def offsets(
    row, position, d,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, STRIDE: tl.constexpr, BANDS: tl.constexpr,
):  # fmt: skip
    """Offset of a row's entry at a position. Rows count from the tile's first: 32 bits suffice."""
    return rows_axis(row, BANDS) * d + feature_at(position, SIZE, CHUNK, STRIDE)[None]


@triton.jit
def entry(row, column, SIZE: tl.constexpr, TRANSPOSE: tl.constexpr):
    """Offset in (d/SIZE, SIZE, SIZE) matrices of the entry at two positions of one group."""
    if TRANSPOSE:
        return column * SIZE + row % SIZE
    else:
        return row * SIZE + column % SIZE


@triton.jit
def load_stage(
    stage_ptr, inner, inner_inside, column, column_inside, dtype: tl.constexpr,
    SIZE: tl.constexpr, TRANSPOSE: tl.constexpr, INTERPRETED: tl.constexpr, BANDS: tl.constexpr,
):  # fmt: skip
    """Load a block-diagonal tile of the stage, minus the identity if dtype is half precision.

    Args:
        stage_ptr: (d/SIZE, SIZE, SIZE) matrices of the groups; float32 or float64.
        inner: positions of the tile's rows, from ``positions``.
        inner_inside: their mask.
        column: positions of the tile's columns.
        column_inside: their mask.
        dtype: dtype of the rows of x, and of the result.
    """
    inner, column = inner_axis(inner, BANDS), columns_axis(column, BANDS)
    inside = inner_axis(inner_inside, BANDS) & columns_axis(column_inside, BANDS)
    inside = same_group(inner, column, inside, SIZE, column.shape[-1])
    stage = tl.load(stage_ptr + entry(inner, column, SIZE, TRANSPOSE), mask=inside, other=0.0)
    if dtype.primitive_bitwidth < 32:
        stage = tl.where((inner == column) & inside, stage - 1.0, stage)
        stage = stage.to(tl.float32)  # the interpreter cannot convert float64 directly
    return round_to(stage, dtype, INTERPRETED)


@triton.jit
def round_to(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round to the nearest number of dtype. The interpreter's own cast to bfloat16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _dot(a, b, total, INTERPRETED: tl.constexpr):
    """total + a @ b; float32 exactly, without tf32."""
    if INTERPRETED and a.dtype.primitive_bitwidth < 32:  # it would multiply their raw bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def product(rows, stage, total, BANDS: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + a tile of rows times a tile of the stage."""
    if BANDS == 1:
        return _dot(rows, stage, total, INTERPRETED)
    else:
        rows, total = tl.permute(rows, (1, 0, 2)), tl.permute(total, (1, 0, 2))
        return tl.permute(_dot(rows, stage, total, INTERPRETED), (1, 0, 2))


@triton.jit
def gram_of(left, right, total, BANDS: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + left^T right of two tiles of rows."""
    if BANDS == 1:
        return _dot(tl.trans(left), right, total, INTERPRETED)
    else:
        left, right = tl.permute(left, (1, 2, 0)), tl.permute(right, (1, 0, 2))
        return _dot(left, right, total, INTERPRETED)
