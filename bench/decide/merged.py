"""A layer as the product with its merged weight, which a CUDA graph can hold.

``boft_ops.cache_merged`` computes a layer in this way, but captures no graph of it: a graph would
go on with the weight of the moment.
"""

from __future__ import annotations

import torch
from torch import nn

from boft_ops import BOFTLinear
from boft_ops.ops.merged_linear import MergedWeight, merged_linear, merged_with_rotation
from boft_ops.ops.planner import plan_for


class MergedLayer(nn.Module):
    """A ``BOFTLinear`` of the method "exact" and side "in", with the gradients that it has.

    Args:
        layer: the layer, whose parameters are trained.
        keeps: True to make the merged weight now and never again, as for the later microbatches of
            accumulated gradients; False to make it in every call.
    """

    def __init__(self, layer: BOFTLinear, keeps: bool) -> None:
        super().__init__()
        self.layer = layer
        self._kept = self._merged() if keeps else None

    @torch.no_grad()
    def _merged(self) -> MergedWeight:
        layer = self.layer
        weight = layer.frozen_weight
        stages = plan_for(weight, layer.n_factors, layer.block_size)
        is_scale_trained = layer.scale_offset is not None
        return merged_with_rotation(weight, layer.skew, layer.scale, stages, is_scale_trained)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        merged = self._merged() if self._kept is None else self._kept
        layer = self.layer
        return merged_linear(
            x, layer.frozen_weight, layer.skew, layer.scale_offset, layer.bias, merged
        )
