"""Layers for ``kernels.use_kernel_forward_from_hub``; `make hub` puts this file into the copies.

They have a forward and nothing else, as kernels demands: the parameters are those of the layer
whose forward is replaced.
"""

from __future__ import annotations

import torch
from torch import nn

from .ops.linear import boft_linear


class BOFTLinear(nn.Module):
    """y = scale * (x R W^T) + bias, for a layer that holds a frozen W beside the skew of R.

    Attributes:
        weight: W, (n, d).
        skew: packed strict upper triangles, (m, d/b, b(b-1)/2).
        scale: (n,), or None.
        bias: (n,), or None.
    """

    has_backward = True
    can_torch_compile = True

    weight: torch.Tensor
    skew: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return boft_linear(x, self.weight, self.skew, self.scale, self.bias)
