"""Where a stage's groups lie: index arithmetic and tile operations of the rotate kernels.

The entries of all groups, one group after the other, have *positions* 0..d-1: position g*size + i
is entry i of group g. A program owns a run of positions, or several runs ("bands"), and all index
arithmetic starts there: where the feature of a position lies, which positions share a group. Groups
of fewer than 16 entries are packed into a band, a block-diagonal matrix of 16 x 16, since a tensor
core multiplies no less; all bands are one batched dot. Larger groups take a two-dimensional dot
each, in tiles where they need it, or are bands of their own.

Tiles of rows are [rows, positions] if BANDS == 1 and [rows, BANDS, width] otherwise, so that
neighbouring threads read neighbouring bands; the batched dot wants the bands first.
"""

import triton
import triton.language as tl


@triton.jit
def rows_axis(index, BANDS: tl.constexpr):
    return index[:, None] if BANDS == 1 else index[:, None, None]


@triton.jit
def inner_axis(index, BANDS: tl.constexpr):
    """Of a tile of the stage, [inner, columns] or [BANDS, inner, columns]."""
    return index[:, None] if BANDS == 1 else index[:, :, None]


@triton.jit
def columns_axis(index, BANDS: tl.constexpr):
    """Of a tile of the stage, [inner, columns] or [BANDS, inner, columns]."""
    return index[None, :] if BANDS == 1 else index[:, None, :]


@triton.jit
def program(d, SIZE: tl.constexpr, PARTS: tl.constexpr, W: tl.constexpr, BANDS: tl.constexpr):
    """This program's group (or bands), part of the group, and turn along the rows.

    Neighbouring programs take neighbouring columns, so that they read rows together.
    """
    width: tl.constexpr = BANDS * (W // SIZE * SIZE if W >= SIZE else SIZE)
    n_tiles = (d + width - 1) // width * PARTS
    tile = tl.program_id(0) % n_tiles
    turn = (tl.program_id(0) // n_tiles).to(tl.int64)
    return tile // PARTS, tile % PARTS, turn


@triton.jit
def positions(tile, offset, d, SIZE: tl.constexpr, W: tl.constexpr, BANDS: tl.constexpr):
    """Positions of a run, and which of them exist.

    A band holds as many whole groups as fit; of a larger group (``tile``) the run starts ``offset``
    entries into it.
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
    """Of the entries of a tile of the stage that exist, those of one group."""
    if W >= 2 * SIZE:  # else there is but one group in a band
        inside = inside & (inner // SIZE == column // SIZE)
    return inside


@triton.jit
def feature_at(position, SIZE: tl.constexpr, CHUNK: tl.constexpr, STRIDE: tl.constexpr):
    """The feature at a position: entry (c, e) of group (h, l) is at ((h, c), l, e)."""
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
    """Offset of a row's entry at a position; 32 bits, rows count from the first of a tile."""
    return rows_axis(row, BANDS) * d + feature_at(position, SIZE, CHUNK, STRIDE)[None]


@triton.jit
def entry(row, column, SIZE: tl.constexpr, TRANSPOSE: tl.constexpr):
    """Offset in a (d/size, size, size) tensor of the entry at these positions of one group."""
    if TRANSPOSE:
        return column * SIZE + row % SIZE
    else:
        return row * SIZE + column % SIZE


@triton.jit
def load_stage(
    stage_ptr, inner, inner_inside, column, column_inside, dtype: tl.constexpr,
    SIZE: tl.constexpr, TRANSPOSE: tl.constexpr, INTERPRETED: tl.constexpr, BANDS: tl.constexpr,
):  # fmt: skip
    """Block-diagonal tile of the stage in the dtype of the rows; for halves minus the identity."""
    inner, column = inner_axis(inner, BANDS), columns_axis(column, BANDS)
    inside = inner_axis(inner_inside, BANDS) & columns_axis(column_inside, BANDS)
    inside = same_group(inner, column, inside, SIZE, column.shape[-1])
    stage = tl.load(stage_ptr + entry(inner, column, SIZE, TRANSPOSE), mask=inside, other=0.0)
    if dtype.primitive_bitwidth < 32:
        stage = tl.where((inner == column) & inside, stage - 1.0, stage)
        stage = stage.to(tl.float32)  # the interpreter has no direct conversion of a float64
    return round_to(stage, dtype, INTERPRETED)


@triton.jit
def round_to(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """To the nearest of dtype; the interpreter alone would cut bits off on the way to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _dot(a, b, total, INTERPRETED: tl.constexpr):
    if INTERPRETED and a.dtype.primitive_bitwidth < 32:  # it would multiply them as raw bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def product(rows, stage, total, BANDS: tl.constexpr, INTERPRETED: tl.constexpr):
    """A tile of rows times a tile of the stage."""
    if BANDS == 1:
        return _dot(rows, stage, total, INTERPRETED)
    else:
        rows, total = tl.permute(rows, (1, 0, 2)), tl.permute(total, (1, 0, 2))
        return tl.permute(_dot(rows, stage, total, INTERPRETED), (1, 0, 2))


@triton.jit
def gram_of(left, right, total, BANDS: tl.constexpr, INTERPRETED: tl.constexpr):
    """left^T right of two tiles of rows."""
    if BANDS == 1:
        return _dot(tl.trans(left), right, total, INTERPRETED)
    else:
        left, right = tl.permute(left, (1, 2, 0)), tl.permute(right, (1, 0, 2))
        return _dot(left, right, total, INTERPRETED)
