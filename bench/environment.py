"""What a result has to say about the machine and the software, and nothing that names the place."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import boft_ops
from boft_ops import _backend

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
        "serving": {
            row["op"]: forced or row["serving"]
            for row in _backend.report()
            if row["device"] == device.type
        },
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def slug(name: str) -> str:
    """A device name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    """The model, with family and model number where the name alone says little."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    if "model name" not in found:
        return platform.machine()
    numbers = f" (family {found['cpu family']}, model {found['model']})"
    return found["model name"].strip() + numbers if "cpu family" in found else found["model name"]


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> dict:
    """The commit that was measured, and whether files that matter differed from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "-s", "--", *MEASURED))}
    except (OSError, subprocess.CalledProcessError):  # an sdist, or no git
        return {"id": None, "dirty": None}
