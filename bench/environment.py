"""What a result has to say about the machine and the software, and nothing that names the place."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import boft_ops
from boft_ops import _backend, _tuned
from boft_ops._device import cpu_name, slug, version

__all__ = ["DTYPES", "ROOT", "commit", "describe", "device_name", "slug"]

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by their names in results
# what a measurement depends on; results and documents are written by it
MEASURED = ("boft_ops", "csrc", "triton", "bench", "setup.py", ":!bench/results")


def describe(device: torch.device) -> dict:
    """Device, threads and versions, for the machine_info of a result."""
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
        "tuned": bool(_tuned.tables(device)),  # measured choices (docs/tuning.md) were in use
        "serving": {
            row["op"]: forced or row["serving"]
            for row in _backend.report()
            if row["device"] == device.type
        },
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def commit() -> dict:
    """The commit that was measured, and whether files that matter differed from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "-s", "--", *MEASURED))}
    except (OSError, subprocess.CalledProcessError):  # an sdist, or no git
        return {"id": os.environ.get("BOFT_OPS_BENCH_COMMIT"), "dirty": None}
