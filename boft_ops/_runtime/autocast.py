"""Autocast as torch's linear has it: it casts activations and weights, but not the rotation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from . import internals

_NOTHING = nullcontext()


def cast(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in the dtype that autocast gives to matmul operands (float64 stays)."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def disabled(device: str) -> AbstractContextManager:
    """A context without autocast; it costs nothing if autocast is off anyway."""
    return torch.autocast(device, enabled=False) if enabled(device) else _NOTHING


def enabled(device: str) -> bool:
    """True if autocast is on for devices of this type."""
    if not internals.is_any_autocast_enabled():  # asked first, as it takes the least time
        return False
    known = device in ("cuda", "cpu") or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)
