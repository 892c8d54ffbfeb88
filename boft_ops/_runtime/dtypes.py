"""The dtypes that kernels compute in."""

from __future__ import annotations

import torch

# dtype of the rows -> dtype of sums, blocks, stages and scales; a look-up takes no call
COMPUTE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}

HALVES = (torch.bfloat16, torch.float16)


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if it is among these floating dtypes, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def name_of(dtype: torch.dtype | str) -> str:
    """A dtype by its bare name, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
