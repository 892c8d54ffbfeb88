"""Merging into a weight of which each rank holds a shard, as a DTensor.

R is block-diagonal in groups of block_size * 2**(n_factors-1) features, so that a rank can rotate
its own rows and columns if no group of the rotated features crosses the edge of a shard. Only the
skew and the scale are gathered then, which are small.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard


def merge_shard(
    merge: Callable[..., torch.Tensor],
    weight: DTensor,
    blocks: torch.Tensor,
    scale: torch.Tensor | None,
    *,
    side: str,
    kaleidoscope: int,
) -> DTensor:
    """Compute ``merge_weight`` or ``unmerge_weight`` of a weight on its shards.

    The whole weight is gathered, of this one layer, if groups of rotated features cross the edges
    of shards. FSDP's shards of rows never cut the groups of a rotation of the inputs.

    Args:
        merge: the function, with the signature of ``merge_weight``.
        weight: (n, ...), placed in any way but as partial sums.
        blocks, scale: whole on every rank.
        side, kaleidoscope: as for ``merge_weight``.

    Returns:
        A DTensor with the shape, dtype and placements of ``weight``.

    Raises:
        ValueError: FSDP and tensor parallelism cut the same rows, which the ranks do not divide.
    """
    mesh, placements = weight.device_mesh, weight.placements
    parts = [1] * weight.dim()  # shards by dimension
    for size, placement in zip(mesh.shape, placements, strict=True):
        if hasattr(placement, "dim"):
            parts[placement.dim] *= size
    if any(isinstance(p, _StridedShard) for p in placements) and weight.shape[0] % parts[0]:
        raise ValueError(  # a rank's rows are then no range
            f"weight: expected rows that {parts[0]} ranks divide, got shape {tuple(weight.shape)}"
        )
    options = {"side": side, "kaleidoscope": kaleidoscope}
    shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    blocks_of_rank = _blocks_of_rank(weight.shape, parts, shape, offset, blocks, **options)
    if blocks_of_rank is not None:
        local, rows = weight.to_local(), slice(offset[0], offset[0] + shape[0])
        if local.numel():
            local = merge(local, blocks_of_rank, None if scale is None else scale[rows], **options)
    else:
        place = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        local = merge(weight.full_tensor(), blocks, scale, **options)[place].contiguous()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def _blocks_of_rank(
    whole_shape: torch.Size,
    parts: list[int],
    shape: tuple[int, ...],
    offset: tuple[int, ...],
    blocks: torch.Tensor,
    side: str,
    kaleidoscope: int,
) -> torch.Tensor | None:
    """The blocks of this rank's rotated features; None if a group crosses the edge of a shard.

    The answer is None on all ranks or on none, as all have to take part in gathering.
    """
    if any(n > 1 for n in parts[2:]):
        return None  # a kernel of a convolution, cut along its height or width
    inner = math.prod(whole_shape[2:])
    cut, n_cuts, first, features = (
        (whole_shape[0], parts[0], offset[0], shape[0])
        if side == "out"
        else (whole_shape[1] * inner, parts[1], offset[1] * inner, shape[1] * inner)
    )
    if n_cuts == 1:
        return blocks
    block_size, n_factors = blocks.shape[-1], len(blocks) // (2 * kaleidoscope or 1)
    if cut % (n_cuts * (block_size << (n_factors - 1))):
        return None
    return blocks[:, first // block_size : (first + features) // block_size]
