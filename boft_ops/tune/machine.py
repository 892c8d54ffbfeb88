"""What the cost model has to know of a machine, and how it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

# Of a GPU, where nothing is measured; H100, by its data sheet, with halves at 600 TFLOP/s. Of a
# CPU: two cores with AVX2. The ratios are those of plan.PASS_COST.
DATA_SHEET = {
    "cpu": (6.25e9, {"float32": 100e9}, 0.0),
    "cuda": (3.43e12, {"bfloat16": 600e12, "float16": 600e12, "float32": 60e12}, 4e-6),
}


class Machine(NamedTuple):
    """Rates and limits.

    Attributes:
        bytes: per second, read and written.
        flops: dtype -> per second.
        launch: seconds from one kernel to the next.
        processors: multiprocessors of a GPU, threads of a CPU.
        shared: bytes of shared memory that a program may have, and a multiprocessor has.
        cache: bytes of the largest cache.
    """

    bytes: float
    flops: dict[str, float]
    launch: float
    processors: int
    shared: int
    cache: int

    def rate(self, dtype: str) -> float:
        """Flops per second in ``dtype``; half of float32's for float64, float32's for others."""
        if dtype in self.flops:
            return self.flops[dtype]
        return self.flops["float32"] / (2 if dtype == "float64" else 1)

    def seconds(self, n_bytes: float, flops: float, dtype: str) -> float:
        """The larger of what the bytes and what the flops take."""
        return max(n_bytes / self.bytes, flops / self.rate(dtype))


def data_sheet(device: torch.device) -> Machine:
    """By the type of the device alone."""
    return Machine(*DATA_SHEET[device.type], *_limits(device))


def measured(device: torch.device, dtype: torch.dtype) -> Machine:
    """With the rates of the fastest copy and the fastest matrix products seen here."""
    machine = data_sheet(device)
    cuda = device.type == "cuda"
    source = torch.randn((1 << 28) if cuda else (1 << 23), device=device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / _fastest(partial(target.copy_, source), device)
    del source, target
    flops = {}
    size = 8192 if cuda else 1024
    for kind in {dtype, torch.float32}:
        a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
        name = str(kind).removeprefix("torch.")
        flops[name] = 2 * size**3 / _fastest(partial(torch.mm, a, b), device)
    return machine._replace(bytes=rate, flops=flops)


def _fastest(run: Callable[[], object], device: torch.device, seconds: float = 0.3) -> float:
    run()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _limits(device: torch.device) -> tuple[int, int, int]:
    if device.type == "cuda" and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(device)
        shared = getattr(found, "shared_memory_per_block_optin", 0) or 64 << 10
        cache = getattr(found, "L2_cache_size", 0) or 64 << 20
        return found.multi_processor_count, shared, cache
    if device.type == "cuda":
        return 132, 227 << 10, 50 << 20  # an H100, to explain
    return torch.get_num_threads(), 0, _last_level_cache()


def _last_level_cache() -> int:
    """Bytes, at most 64 MiB (overwriting more takes longer than it tells); 32 MiB if unknown."""
    found = 32 << 20
    try:
        sizes = [p.read_text() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")]
        found = max(int(size.strip().removesuffix("K")) for size in sizes) << 10
    except (OSError, ValueError):
        pass
    return min(found, 64 << 20)
