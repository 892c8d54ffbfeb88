"""Limits of a GPU, and grids that fill it.

Tiles, grids and splits that depend on the device are chosen by ``Limits`` alone: a result is
bit-reproducible on every device of one model. Imports torch, not triton.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

RESERVED = 1024  # bytes of shared memory that the driver takes for each program
MOST_WAVES = 16  # more waves leave little of the last one's idle time to be saved


class Limits(NamedTuple):
    """Resources of one GPU.

    Attributes:
        multiprocessors: number of multiprocessors (compute units on AMD).
        program_shared: bytes of shared memory that one program may take.
        shared: bytes of shared memory of a multiprocessor.
        registers: 32-bit registers of a multiprocessor.
        threads: threads of a multiprocessor.
        warp: threads of a warp (wavefront on AMD).
        capability: 10 * major + minor of the compute capability; 0 on AMD.
    """

    multiprocessors: int
    program_shared: int
    shared: int
    registers: int
    threads: int
    warp: int
    capability: int

    def programs(self, num_warps: int, registers: int, shared: int) -> int:
        """Programs that run on a multiprocessor at a time, at least 1.

        Args:
            num_warps: warps per program.
            registers: registers per thread.
            shared: bytes of shared memory per program.
        """
        threads = num_warps * self.warp
        registers = -(-registers // 8) * 8  # given out in eights
        return max(
            1,
            min(
                self.threads // threads,
                self.registers // (registers * threads),
                self.shared // (shared + RESERVED),
            ),
        )

    @property
    def is_amd(self) -> bool:
        """True for AMD's GPUs."""
        return self.capability == 0

    @property
    def is_rdna(self) -> bool:
        """True for AMD's Radeon GPUs, whose threads have fewer registers than an Instinct's."""
        return self.is_amd and self.warp == 32

    @property
    def multiplies_halves(self) -> bool:
        """False before compute capability 8.0, where Triton finds no matrix units."""
        return self.is_amd or self.capability >= 80


# Assumed where there is no device: in the interpreter, and for fake tensors.
H200 = Limits(132, 227 << 10, 228 << 10, 65536, 2048, 32, 90)


@cache
def limits_of(device: int) -> Limits:
    """Limits of a CUDA device by its number; those of an H200 if there is none."""
    if device < 0 or not torch.cuda.is_available():
        return H200
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block", 48 << 10)
    program_shared = getattr(found, "shared_memory_per_block_optin", 0) or shared
    return Limits(
        found.multi_processor_count,
        program_shared,
        getattr(found, "shared_memory_per_multiprocessor", 0) or program_shared,
        getattr(found, "regs_per_multiprocessor", 0) or 65536,
        getattr(found, "max_threads_per_multi_processor", 0) or 1024,
        found.warp_size,
        0 if torch.version.hip else 10 * found.major + found.minor,
    )


def turns_for(n_tiles: int, row_tiles: int, slots: int, start: float) -> int:
    """Tiles of rows that each program takes, so that its last wave is about full.

    Programs run in waves of ``slots``. A wave takes as long as its tiles of rows and the time
    before the first one. Rows are cut so that all waves together take the least time; equal times
    go to the fewer waves.

    Args:
        n_tiles: programs that one range of rows takes.
        row_tiles: tiles of rows in all.
        slots: programs that the device runs at a time.
        start: time before the first tile of a program, in tiles.
    """

    def cost(turns: int) -> float:
        waves = -(-n_tiles * -(-row_tiles // turns) // slots)
        return waves * (turns + start)

    ranges = (max(1, waves * slots // max(1, n_tiles)) for waves in range(1, MOST_WAVES + 1))
    return min((max(1, -(-row_tiles // count)) for count in ranges), key=cost)


def splits_for(n_tiles: int, slots: int, most: int, partial: float) -> int:
    """Ranges that the rows are cut into if each makes a partial sum, for any number of rows.

    As ``turns_for``; the work of one split is what all the rows take divided by the splits.

    Args:
        n_tiles: programs that one range of rows takes.
        slots: programs that the device runs at a time.
        most: largest number of splits.
        partial: time of writing and reading one partial sum, in parts of the work on all rows.
    """

    def cost(splits: int) -> float:
        return -(-n_tiles * splits // slots) / splits + splits * partial

    counts = (waves * slots // max(1, n_tiles) for waves in range(1, MOST_WAVES + 1))
    return min((max(1, min(count, most)) for count in counts), key=cost)
