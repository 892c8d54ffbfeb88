"""Memory of a layer: bytes saved for backward, and the peak of forward and backward."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


def saved_bytes(forward: Callable[[], torch.Tensor], excluded: Iterable[torch.Tensor] = ()) -> int:
    """Count the bytes that the graph made by ``forward`` keeps for its backward.

    Each storage counts once and in full, however many tensors view it. The storages of ``excluded``
    do not count; these are parameters and buffers, which exist anyway.
    """
    known = {t.untyped_storage().data_ptr() for t in excluded}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that is packed itself would keep its own graph alive

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # kept until all bytes are counted, so that no address is used twice
    total = sum(kept.values())
    del output
    return total


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Measure the peak memory of ``run`` in bytes, beyond the memory that was in use before.

    On a GPU it is the peak of torch's caching allocator. On a CPU it is the peak of the running sum
    of all allocations and releases of tensor memory, as torch's profiler records them. Scratch
    memory that a BLAS takes directly from the system is in neither.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = peak = 0
    for change in _changes(profiler):
        now += change
        peak = max(peak, now)
    return peak


def settle_heap() -> None:
    """Bring glibc's allocator to the state of a long-running process.

    In a new process glibc takes each large block from the system and returns it at once. Every new
    page then costs a page fault, which takes longer than most operators here. Freeing one block
    just below the limit of 32 MiB raises glibc's thresholds permanently. Without this call the
    first contestant that frees such a block would raise them, and times would depend on the order
    of contestants. With other C libraries the call has no effect.
    """
    block = torch.empty((32 << 20) - 65536, dtype=torch.uint8)
    del block


def _changes(profiler: profile) -> list[int]:
    """List the bytes allocated (positive) or released (negative), in order of time.

    The exported trace is the only public source of all changes. The event list has only those
    outside of an operator.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(os.fspath(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    return [e["args"]["Bytes"] for e in sorted(changes, key=lambda e: e["ts"])]
