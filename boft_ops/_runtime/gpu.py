"""Triton's kernels by name, the limits of GPUs (triton/limits.py), and what runs on a GPU."""

from __future__ import annotations

import importlib
import re
import warnings
from functools import cache
from typing import Any

import torch

from . import build, internals, native
from .namespace import PACKAGE

LEAST_CAPABILITY = 8, 0  # the least that has all instructions of the CUDA C++ kernels


def triton_object(name: str) -> Any:
    """The object ``"module:name"`` under triton_kernels."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"{PACKAGE}.triton_kernels.{module}"), attribute)


def limits_of(device: int) -> Any:
    """The ``Limits`` of a CUDA device by its number; -1: of the interpreter."""
    return triton_object("limits:limits_of")(device)


def triton_takes(x: torch.Tensor) -> bool:
    """False for half precision on NVIDIA's GPUs before compute capability 8.0.

    Triton uses no matrix units there, and its products spill registers. torch's do neither.
    """
    if x.dtype.itemsize > 2 or not x.is_cuda:
        return True
    compiling = torch.compiler.is_compiling()
    return (_has_matrix_units if compiling else _cached_has_matrix_units)(x.get_device())


@internals.constant_in_graphs
def _has_matrix_units(device: int) -> bool:
    return limits_of(device).multiplies_halves


_cached_has_matrix_units = cache(_has_matrix_units)


def serves(archs: str, capability: tuple[int, int]) -> bool:
    """True if code for these architectures runs on a GPU.

    Machine code of X.Y runs on X.Z with Z >= Y, PTX of X.Y on every later GPU too. A suffix "a"
    restricts both to X.Y itself, and "f" to X.Z.

    Args:
        archs: a list such as "8.0;9.0a;10.0+PTX".
        capability: compute capability of the GPU.
    """
    for major, minor, suffix, ptx in re.findall(build.ARCH, archs):
        compiled = int(major), int(minor)
        if suffix == "a":
            fits = compiled == capability
        else:
            fits = compiled <= capability and compiled[0] == capability[0]
            fits = fits or (ptx != "" and suffix == "" and compiled <= capability)
        if fits:
            return True
    return False


def native_fault(device: int) -> str | None:
    """The reason why the native library's CUDA kernels cannot run on a GPU, and a remedy; or None.

    Args:
        device: number of a CUDA device.
    """
    archs, cuda = native.archs(), native.cuda_version()
    if archs is None or device < 0 or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    own = ".".join(map(str, capability))
    has = f"device {device} ({torch.cuda.get_device_name(device)}) has {own}"
    if capability < LEAST_CAPABILITY:
        return f"the CUDA C++ kernels need compute capability 8.0, and {has}"
    driver = internals.cuda_driver_version()
    if cuda is not None and driver // 1000 < int(cuda.partition(".")[0]):
        return (
            f"the native library brings the runtime of CUDA {cuda}, and the driver is one for CUDA "
            f"{driver // 1000}.{driver % 1000 // 10}; update the driver, or install from source "
            "with the nvcc of an older CUDA"
        )
    if serves(archs, capability):
        return None
    return (
        f"the native library was compiled for GPUs of compute capability {archs}, and {has}; "
        f"install again with TORCH_CUDA_ARCH_LIST={own}"
    )


def native_takes(x: torch.Tensor) -> bool:
    """False on a GPU where the native library's kernels cannot run.

    One warning for each says so, unless it is too old for these kernels: nothing is amiss then.
    """
    if not x.is_cuda:
        return True
    compiling = torch.compiler.is_compiling()
    return (_has_native_code if compiling else _cached_has_native_code)(x.get_device())


@internals.constant_in_graphs
def _has_native_code(device: int) -> bool:
    return _cached_has_native_code(device)


@cache
def _cached_has_native_code(device: int) -> bool:
    fault = native_fault(device)
    if fault and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY:
        message = f"{PACKAGE}: {fault}. Until then Triton or plain PyTorch serve it"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return fault is None
