"""The dtypes that kernels compute in."""

from __future__ import annotations

import torch


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if a tensor is float64, else float32: for sums, blocks, stages and scales."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """A dtype by its bare name, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
