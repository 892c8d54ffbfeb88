"""The names of devices and the versions of software, on which measurements depend."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from .._version import __version__
from . import native


def name_of(device: torch.device) -> str:
    """The model of a GPU; of a CPU also the instruction set and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {native.isa or 'no kernels'}, {torch.get_num_threads()} threads"


def devices_of(backend: str) -> tuple[str, ...]:
    """The types of the devices that a backend has kernels for; none if there is no such backend."""
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return "cuda", "cpu"
    return {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}.get(backend, ())


def slug(name: str) -> str:
    """A device name as the name of a file or folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def cpu_name() -> str:
    """The model of this CPU, with family and model number, as the name alone may say little."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    if "model name" not in found:
        return platform.machine()
    numbers = f" (family {found['cpu family']}, model {found['model']})"
    return found["model name"].strip() + numbers if "cpu family" in found else found["model name"]


@cache
def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions(device: torch.device) -> dict[str, str | None]:
    """The versions that a measurement on this device holds for; minor ones of torch and Triton."""
    triton = version("triton") if device.type == "cuda" else None
    minor = {"torch": torch.__version__, "triton": triton}
    short = {k: v and ".".join(v.split(".")[:2]) for k, v in minor.items()}
    return {"boft_ops": __version__, **short}
