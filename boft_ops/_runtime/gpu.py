"""Triton's kernels by name, and the limits of GPUs (triton/limits.py)."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch

from .namespace import PACKAGE


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


def _has_matrix_units(device: int) -> bool:
    return limits_of(device).multiplies_halves


# As torch.compiler.assume_constant_result sets it; that would import torch._dynamo here.
_has_matrix_units._dynamo_marked_constant = True
_cached_has_matrix_units = cache(_has_matrix_units)
