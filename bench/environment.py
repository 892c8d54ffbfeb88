"""Description of the machine and the software in results, without the names of host and folders."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import boft_ops
from boft_ops._runtime import backend, tuned
from boft_ops._runtime.device import cpu_name, slug, version

__all__ = ["DTYPES", "ROOT", "clocks", "commit", "describe", "device_name", "facts", "slug"]

ROOT = Path(__file__).resolve().parents[1]
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # names in results -> dtypes
# The files that a measurement depends on. Results and documents are its outputs.
MEASURED = ("boft_ops", "csrc", "triton", "bench", "setup.py", ":!bench/results")


def describe(device: torch.device) -> dict:
    """Describe device, threads and versions, for the machine_info of a result."""
    forced = os.environ.get("BOFT_OPS_BACKEND")
    return {
        "device": device_name(device),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": version("peft"),
        "triton": version("triton"),
        "boft_ops": boft_ops.__version__,
        "backend": forced or "auto",
        # True if measured choices (docs/tuning.md) were in use.
        "tuned": bool(tuned.table(tuned.number_of(device)).names),
        "serving": {
            row["op"]: forced or row["serving"]
            for row in backend.report()
            if row["device"] == device.type
        },
    }


def device_name(device: torch.device) -> str:
    """Name of a device in results: that of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def commit() -> dict:
    """Return the commit that is measured; "dirty" is true if measured files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    # A copy of a checkout may lie inside another repository, which does not know the copy.
    if given := os.environ.get("BOFT_OPS_BENCH_COMMIT"):
        return {"id": given, "dirty": None}
    try:
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "-s", "--", *MEASURED))}
    except (OSError, subprocess.CalledProcessError):  # an sdist, or no git
        return {"id": None, "dirty": None}


def facts(device: torch.device) -> dict:
    """Describe the machine, its software, the commit, and the clocks, which are only read."""
    found = describe(device) | {"commit": commit()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        names = ("multi_processor_count", "total_memory", "L2_cache_size", "major", "minor")
        found["properties"] = {name: getattr(properties, name, None) for name in names}
        found["clocks"] = clocks()
    return found


def clocks() -> dict[str, str]:
    """Read driver, clocks, power and temperature of the GPU; empty without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    line = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return dict(zip(QUERY.split(","), map(str.strip, line.split(",")), strict=False))
