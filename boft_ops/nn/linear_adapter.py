"""What one adapter of a linear layer trains, apart from the layer."""

from __future__ import annotations

import torch
from torch import nn

from .._runtime import checks
from ..ops.cayley import cayley
from ..ops.dropout import MultiplicativeDropout
from .base import adapter_options


class LinearAdapter(nn.Module):
    """The rotation of a layer's inputs and the scale of its outputs: what is trained.

    Attributes:
        skew: (m, K, b(b-1)/2), zeros at first.
        scale: (n,), ones at first, or None.
    """

    side, merged, n_identity = "in", False, 0  # as BOFTLayer has them; here they never change

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_size: int = 8,
        n_factors: int = 2,
        side: str = "in",
        scale: bool = True,
        p_component: float = 0.0,
        p_block: float = 0.0,
        method: str = "exact",
        kaleidoscope: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if side != "in":
            raise ValueError(f"side: expected 'in' over a base that is only called, got {side!r}")
        if kaleidoscope:
            raise ValueError(
                f"kaleidoscope: expected 0 over a base that is only called, got {kaleidoscope!r}"
            )
        checks.floating_dtype("dtype", dtype)
        checks.choice("method", method, checks.METHODS)
        if not isinstance(scale, bool):
            raise TypeError(f"scale: expected a bool, got {scale!r}")
        checks.butterfly_shape(in_features, block_size, n_factors)
        self.block_size, self.n_factors, self.method = block_size, n_factors, method
        self.out_features = out_features
        self.dropout = MultiplicativeDropout(p_component, p_block)
        shape = n_factors, in_features // block_size, block_size * (block_size - 1) // 2
        kind = {"device": device, "dtype": dtype}
        self.skew = nn.Parameter(torch.zeros(shape, **kind))
        one = nn.Parameter(torch.ones(out_features, **kind)) if scale else None
        self.register_parameter("scale", one)

    def blocks(self, n_factors: int = 0) -> torch.Tensor:
        """(m, K, b, b), with dropout in training; then the identity, up to that many factors."""
        blocks = self.dropout(cayley(self.skew, method=self.method))
        missing = n_factors - len(blocks)
        if missing <= 0:
            return blocks
        eye = torch.eye(self.block_size, dtype=blocks.dtype, device=blocks.device)
        return torch.cat([blocks, eye.expand(missing, *blocks.shape[1:])])

    def options(self) -> dict[str, int | float | str | bool]:
        """The keyword arguments that make another one like this."""
        return adapter_options(self, self.dropout)

    def base_kind(self) -> tuple[str, int]:
        """What is rotated: torch's layer, and its outputs."""
        return "Linear", self.out_features

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items() if value)
