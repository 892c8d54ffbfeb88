"""A layer as the product with a merged weight that it keeps, which a CUDA graph can hold.

``boft_ops.cache_merged`` computes a layer in this way, but captures no graph of it: a graph would
go on with the weight of the moment.
"""

from __future__ import annotations

import torch
from torch import nn

from boft_ops import BOFTLinear
from boft_ops.ops.merged_linear import merged_linear, merged_with_rotation
from boft_ops.ops.planner import plan_for
from boft_ops.ops.rotation import SkewRotation


class MergedLayer(nn.Module):
    """A ``BOFTLinear`` of the method "exact" and side "in", with the gradients that it has.

    The merged weight is made now and never again, as for the later microbatches of accumulated
    gradients.

    Args:
        layer: the layer, whose parameters are trained.
    """

    def __init__(self, layer: BOFTLinear) -> None:
        super().__init__()
        self.layer = layer
        weight, rotation = layer.frozen_weight, SkewRotation(layer.skew)
        stages = plan_for(weight, layer.n_factors, layer.block_size)
        is_scale_trained = layer.scale_offset is not None
        operands = weight, rotation, layer.scale, stages, is_scale_trained
        self._kept = merged_with_rotation(*operands)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        operands = x, layer.frozen_weight, SkewRotation(layer.skew), layer.scale_offset, layer.bias
        return merged_linear(*operands, self._kept, scale_base=1, keeps=True)
