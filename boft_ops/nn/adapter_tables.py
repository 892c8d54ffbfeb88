"""The rotations and scales of a layer's adapters as tables, which rows of a batch index by number.

A call does the same few operations for any number of adapters. Prepared tables keep their memory:
an adapter that comes or goes is written into its row, so that compiled graphs and CUDA graphs that
read the tables stay valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter, itemgetter
from typing import NamedTuple

import torch

from .._runtime.dtypes import COMPUTE, HALVES, widest
from ..ops.planner import plan_for
from ..ops.rotate_indexed import IDENTITY, compose_all, rotate_indexed
from ..ops.stages import Stage, plan
from .base_modules import check_numbers
from .changes import Source, own_part
from .linear_adapter import LinearAdapter

# A table by number has an entry for the base alone, -1, and two for numbers out of range.
FIRST, EXTRA = -2, 3


class Group(NamedTuple):
    """The matrices of the adapters of one block size.

    Attributes:
        positions: int32 (slots + 3,), by number + 2: the adapter's row in ``matrices``, -1 for the
            base and adapters of another group, or the number of rows for what is no adapter.
        stages: of the butterfly with the most factors.
        matrices: of each stage, (rows, d/size, size, size): R, or R - I in half precision.
    """

    positions: torch.Tensor
    stages: tuple[Stage, ...]
    matrices: tuple[torch.Tensor, ...]

    def rotate(self, x: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """Rotate each row of x (..., d) by the adapter of its entry (N,)."""
        position = self.positions.index_select(0, entries)
        matrices, dtype = self.matrices, COMPUTE[x.dtype]
        if matrices[0].dtype in HALVES:
            position, matrices = self._wide(position, dtype)
        return rotate_indexed(x, matrices, self.stages, position, False)

    def _wide(
        self, position: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The matrices R that a batch needs in a dtype, and the positions of its rows in them."""
        matrices, count = self.matrices, len(self.matrices[0])
        if len(position) < count:  # few rows, as in decoding: a matrix for each of them
            chosen = position.clamp(0, count - 1)
            matrices = tuple(matrix.index_select(0, chosen) for matrix in matrices)
            own = torch.arange(len(position), dtype=torch.int32, device=position.device)
            own = torch.where(position < count, own, len(position))
            position = torch.where(position == IDENTITY, IDENTITY, own).to(torch.int32)
        return position, tuple(matrix.to(dtype) + _identity(matrix, dtype) for matrix in matrices)


class Tables(NamedTuple):
    """All that a call with ``adapter_index`` reads of the adapters of a layer.

    Attributes:
        rows: the block size and the row of each number.
        groups: one for each of ``block_sizes``.
        block_sizes: in the order of ``groups``.
        offsets: (slots + 3, n), by number + 2: the scale minus one; None if no adapter has a scale.
        slots: numbers from 0 to slots - 1 have entries.
    """

    rows: dict[int, tuple[int, int]]
    groups: list[Group]
    block_sizes: list[int]
    offsets: torch.Tensor | None
    slots: int

    def entries(self, index: torch.Tensor) -> torch.Tensor:
        """The entries in tables by number, for numbers (N,) of adapters."""
        return index.clamp(FIRST, self.slots) - FIRST

    def fit(self, adapters: Mapping[int, LinearAdapter], dtype: torch.dtype) -> bool:
        """True if there is memory for all of these adapters, by number, in this dtype."""
        if max(adapters, default=-1) >= self.slots:
            return False
        counts: dict[int, int] = {}
        for adapter in adapters.values():
            size = adapter.block_size
            has_scale = adapter.scale_offset is not None
            if size not in self.block_sizes or (has_scale and self.offsets is None):
                return False
            counts[size] = counts.get(size, 0) + 1
            group = self.groups[self.block_sizes.index(size)]
            like = group.matrices[0]
            if (
                adapter.n_factors > group.stages[-1].last
                or counts[size] > len(like)
                or (like.dtype, like.device) != (dtype, adapter.skew.device)
            ):
                return False
        return True

    def write(self, number: int, adapter: LinearAdapter) -> None:
        """Write an adapter that fits into the entries of its number."""
        size = adapter.block_size
        chosen = self.groups[self.block_sizes.index(size)]
        row = self._row(number, size)
        composed = _composed([adapter], chosen.stages, widest(chosen.matrices[0].dtype))
        for matrix, new in zip(chosen.matrices, composed, strict=True):
            wide = new[0] - _identity(new, new.dtype) if matrix.dtype in HALVES else new[0]
            matrix[row].copy_(wide)
        if self.offsets is not None:
            self.offsets[number - FIRST].copy_(_offset(adapter, self.offsets))
        for group in self.groups:
            group.positions[number - FIRST].fill_(row if group is chosen else IDENTITY)
        self.rows[number] = size, row

    def clear(self, number: int) -> None:
        """Take the adapter of a number out: rows of a batch that name it become NaN."""
        self.rows.pop(number, None)
        for group in self.groups:
            group.positions[number - FIRST].fill_(len(group.matrices[0]))

    def _row(self, number: int, block_size: int) -> int:
        """The row that the number has among adapters of this block size, or else the next free."""
        taken = {row: own for own, (size, row) in self.rows.items() if size == block_size}
        mine = (row for row, own in taken.items() if own == number)
        return next(mine, next(row for row in range(len(taken) + 1) if row not in taken))


def empty_tables(
    adapters: Mapping[int, LinearAdapter], dtype: torch.dtype, slots: int | None, room: int
) -> Tables:
    """Allocate tables in which all of these adapters fit.

    Args:
        adapters: by number.
        dtype: of the matrices; bfloat16 and float16 hold R - I.
        slots: the most numbers, and rows of each group; None for as many as there are adapters,
            times ``room``.
        room: see ``slots``.
    """
    numbers = slots or room * (max(adapters, default=-1) + 1)
    groups, offsets = [], None
    by_size = _by_block_size(adapters)
    for members in by_size.values():
        like, count = members[0], slots or room * len(members)
        m = max(adapter.n_factors for adapter in members)
        stages = plan(m, like.block_size, like.skew.device.type)
        d = like.own_skew().shape[1] * like.block_size
        options = {"dtype": dtype, "device": like.skew.device}
        matrices = tuple(
            torch.zeros(count, d // stage.size, stage.size, stage.size, **options)
            for stage in stages
        )
        positions = torch.full(
            (numbers + EXTRA,), count, dtype=torch.int32, device=like.skew.device
        )
        positions[IDENTITY - FIRST] = IDENTITY
        groups.append(Group(positions, stages, matrices))
    own = next((a.own_offset() for a in adapters.values() if a.scale_offset is not None), None)
    if own is not None:
        wide = dtype if dtype in HALVES else own.dtype
        offsets = torch.zeros(numbers + EXTRA, len(own), dtype=wide, device=own.device)
    return Tables({}, groups, list(by_size), offsets, numbers)


def composed_tables(adapters: Mapping[int, LinearAdapter], slots: int, x: torch.Tensor) -> Tables:
    """Compose the tables for one call, differentiable; the stages are those tuned for x."""
    groups, rows = [], {}
    by_size = _by_block_size(adapters)
    numbers = {id(adapter): number for number, adapter in adapters.items()}
    for size, members in by_size.items():
        stages = plan_for(x, max(adapter.n_factors for adapter in members), size)
        matrices = _composed(members, stages, COMPUTE[x.dtype], x)
        positions = [len(members)] * (slots + EXTRA)
        for number in (IDENTITY, *adapters):
            positions[number - FIRST] = IDENTITY
        for row, adapter in enumerate(members):
            positions[numbers[id(adapter)] - FIRST] = row
            rows[numbers[id(adapter)]] = size, row
        positions = torch.tensor(positions, dtype=torch.int32, device=x.device)
        groups.append(Group(positions, stages, matrices))
    offsets = None
    own = [a.own_offset() for a in adapters.values() if a.scale_offset is not None]
    if own:
        check_numbers({"scale_offset": own[0]}, x)
        zeros = torch.zeros_like(own[0])
        entries = range(FIRST, slots + EXTRA + FIRST)
        lines = [zeros if i not in adapters else _offset(adapters[i], zeros) for i in entries]
        offsets = torch.stack(lines)
    return Tables(rows, groups, list(by_size), offsets, slots)


class Watch:
    """Notices that adapters were replaced or written to, without Python code for each of them."""

    def __init__(self, adapters: Mapping[int, LinearAdapter]) -> None:
        self._adapters = list(adapters.values())
        self._dicts = [adapter._parameters for adapter in self._adapters]
        self._strengths = list(map(_STRENGTH, self._adapters))
        # The tensors and their memory are kept: no others may get their identity and address.
        self._kept = self._tensors()
        self._ids = list(map(id, self._kept))
        own = [own_part(tensor) for tensor in self._kept if tensor is not None]
        self._memory = [tensor.detach() for tensor in own]
        self._addresses = list(map(_ADDRESS, own))
        # A change in place raises the version; a tensor made in inference mode has none.
        self._tracked = [tensor for tensor in own if not tensor.is_inference()]
        self._versions = list(map(_VERSION, self._tracked))
        self._untracked = [Source.of(t) for t in own if t.is_inference()]
        self._own = own

    def is_stale(self) -> bool:
        return (
            list(map(id, self._tensors())) != self._ids
            or list(map(_STRENGTH, self._adapters)) != self._strengths
            or list(map(_VERSION, self._tracked)) != self._versions
            or list(map(_ADDRESS, self._own)) != self._addresses
            or not all(source.is_now(source.tensor) for source in self._untracked)
        )

    def _tensors(self) -> list[torch.Tensor | None]:
        return [*map(_SKEW, self._dicts), *map(_OFFSET, self._dicts)]


_SKEW, _OFFSET = itemgetter("skew"), itemgetter("scale_offset")
_VERSION, _STRENGTH = attrgetter("_version"), attrgetter("strength")
_ADDRESS = torch.Tensor.data_ptr


def _by_block_size(adapters: Mapping[int, LinearAdapter]) -> dict[int, list[LinearAdapter]]:
    groups: dict[int, list[LinearAdapter]] = {}
    for adapter in adapters.values():
        groups.setdefault(adapter.block_size, []).append(adapter)
    return groups


def _composed(
    adapters: list[LinearAdapter],
    stages: tuple[Stage, ...],
    dtype: torch.dtype,
    x: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The matrices of each stage, (adapters, d/size, size, size)."""
    for adapter in adapters:
        check_numbers({"skew": adapter.skew, "scale_offset": adapter.scale_offset}, x)
    blocks = torch.stack([adapter.blocks(stages[-1].last) for adapter in adapters])
    return compose_all(blocks, stages, dtype)


def _offset(adapter: LinearAdapter, like: torch.Tensor) -> torch.Tensor:
    """The ``own_offset`` of an adapter, or zeros."""
    own = adapter.own_offset()
    return torch.zeros_like(like[0] if like.dim() == 2 else like) if own is None else own


def _identity(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.eye(like.shape[-1], dtype=dtype, device=like.device)
