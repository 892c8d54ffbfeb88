"""The cost model: what bytes, flops, launches and occupancy let one expect (docs/tuning.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..ops.stages import Stage, plan
from .machine import Machine

BYTES_IN_FLIGHT = 24 << 10  # for each multiprocessor, to keep memory busy: 3 TB/s * 1 us / 132
REGISTERS = 65536  # of a multiprocessor, 32 bits each
# Modelled, of a thread: above, a tile is likely to spill. Of tiles compiled for sm_90 those of up
# to 240 did not, but for the fastest of groups of 256 seen on an H200 (200; 88 bytes, as it reads
# the stage); and one of 264, among the fastest as well, took 244.
MOST_REGISTERS = 264
WARPS = 64  # that a multiprocessor holds


class Cost(NamedTuple):
    """Seconds of a training step of one layer, but for its products with W.

    Attributes:
        stages: of the plan.
        side: "in" rotates x, "weight" rotates W, by one stage.
        make: composing the stages, and the gradient of that.
        forward: passes over x, or over W.
        backward: those passes of the backward, with the Gram matrices.
    """

    stages: tuple[Stage, ...]
    side: str
    make: float
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.make + self.forward + self.backward


def cost(
    rows: int,
    d: int,
    n: int,
    stages: Sequence[Stage],
    block_size: int,
    dtype: str,
    machine: Machine,
    side: str = "in",
) -> Cost:
    """Of a layer of d inputs and n outputs on so many rows, with these stages."""
    width = {"float64": 8, "float32": 4}.get(dtype, 2)

    def step(n_bytes: float, flops: float, kind: str = dtype) -> float:
        return machine.seconds(n_bytes, flops, kind) + machine.launch

    def apply(count: int) -> float:
        return sum(step(2 * count * d * width, 2 * count * d * s.size) for s in stages)

    make = sum(step(12 * d * s.size, 6 * d * block_size * s.size, "float32") for s in stages)
    if side == "weight":
        (stage,) = stages
        gram = step(2 * rows * d * width, 2 * rows * d * stage.size)
        return Cost(tuple(stages), side, make, apply(n), apply(n) + gram)
    again = apply(rows) * (len(stages) - 1) / len(stages)
    gradients = sum(step(3 * rows * d * width, 4 * rows * d * s.size) for s in stages)
    return Cost(tuple(stages), side, make, apply(rows), again + gradients)


def plans(
    rows: int, d: int, n: int, m: int, b: int, dtype: str, machine: Machine, device: str
) -> list[Cost]:
    """Every number of stages that x goes through, then the one stage that W goes through."""
    found = [
        cost(rows, d, n, plan(m, b, device, n_stages), b, dtype, machine)
        for n_stages in range(1, m + 1)
    ]
    return [*found, cost(rows, d, n, plan(m, b, device, 1), b, dtype, machine, "weight")]


class Resources(NamedTuple):
    """What one program of a Triton kernel takes.

    Attributes:
        shared: bytes of shared memory.
        registers: for each thread, as far as tiles need them.
        loaded: bytes that it has under way at a time.
        warps: of the program.
    """

    shared: int
    registers: int
    loaded: int
    warps: int


def seconds(
    resources: Resources, programs: int, n_bytes: float, flops: float, dtype: str, machine: Machine
) -> float:
    """Of a launch of so many programs; infinite if one does not fit.

    Memory is as fast as the bytes under way allow, and the last wave of programs takes as long as
    a full one.
    """
    if resources.shared > machine.shared or resources.registers > MOST_REGISTERS:
        return math.inf
    threads = 32 * resources.warps
    at_once = min(
        machine.shared // max(1, resources.shared),
        REGISTERS // (threads * max(32, resources.registers)),
        WARPS // resources.warps,
    )
    if at_once < 1:
        return math.inf
    busy = min(1.0, at_once * resources.loaded / BYTES_IN_FLIGHT)
    waves = programs / (machine.processors * at_once)
    unevenness = math.ceil(waves) / waves
    work = max(n_bytes / (machine.bytes * busy), flops / machine.rate(dtype))
    return work * unevenness + machine.launch
