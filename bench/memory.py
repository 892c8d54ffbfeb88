"""What a layer keeps and needs: bytes saved for backward, peak memory of forward and backward."""

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
    """Bytes that the graph made by ``forward`` keeps for its backward.

    Each storage counts once, in full, however many tensors look at it. The storages of ``excluded``
    (parameters and buffers: there anyway) do not count.
    """
    known = {t.untyped_storage().data_ptr() for t in excluded}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output packed as itself would keep its own graph alive

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # alive until counted, so that no address is used twice
    total = sum(kept.values())
    del output
    return total


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that ``run`` holds at any time, beyond what was there before.

    On a GPU, of torch's caching allocator. On a CPU, the running sum over all allocations and
    releases of tensor memory, as torch's profiler records them: scratch memory that a BLAS takes
    from the system directly is in neither.
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
    """Bring glibc's allocator to where a process of some age has it.

    At first it takes each large block from the system and gives it back at once, and every new page
    costs a fault: more than most operators here. Freeing one block just below its limit of 32 MiB
    raises the thresholds for good. Without this call the first contestant to free such a block
    would do so, and times would depend on who came before. Elsewhere than glibc it does nothing.
    """
    block = torch.empty((32 << 20) - 65536, dtype=torch.uint8)
    del block


def _changes(profiler: profile) -> list[int]:
    """Bytes allocated (or, negative, released), in the order in which that happened.

    The exported trace is the one public place that has every change; the event list keeps only
    those outside of an operator.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(os.fspath(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    return [e["args"]["Bytes"] for e in sorted(changes, key=lambda e: e["ts"])]
