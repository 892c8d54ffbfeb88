"""BOFTLinear and OFTLinear: torch's linear layer with a frozen weight and a rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._runtime import checks
from ..ops.linear import rotated_linear
from ..ops.rotation import SkewRotation
from .base import BOFTLayer
from .config import RotationConfig
from .merged_cache import CachesMerged

if TYPE_CHECKING:
    from typing_extensions import Self


def _linear_arguments(linear: nn.Linear) -> tuple:
    return linear.in_features, linear.out_features, linear.bias is not None


class BOFTLinear(CachesMerged, BOFTLayer, nn.Linear):
    """A frozen ``nn.Linear`` multiplied by a trainable orthogonal butterfly matrix R.

    It computes y = s * (x R W^T) + bias (side "in") or y = s * ((x W^T) R^T) + bias (side "out"),
    see ``boft_linear`` and arXiv 2311.06243, sections 3 and 4.
    A new layer equals the frozen one bit for bit.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        block_size: b; must divide the rotated features, and be even if n_factors > 1.
        n_factors: m butterfly factors; the number of blocks must be a multiple of 2**(m-1).
        side: rotate the inputs ("in", the default) or the outputs ("out").
        scale: True (the default) also trains a factor for each output.
        p_component, p_block: multiplicative dropout in training, see ``multiplicative_dropout``.
        method: "exact" or "neumann5", see ``cayley``.
        kaleidoscope: l > 0 uses the l levels of R_G = R_{l,1} R_{l,2}^T ... R_{1,1} R_{1,2}^T
            instead of R, see ``kaleidoscope_matmul``; every R_{j,i} is a butterfly of n_factors
            factors. 0 (the default) uses a single butterfly.

    Attributes:
        frozen_weight: (out_features, in_features), the parameter ``weight`` of state dicts.
        weight: what the layer multiplies by, differentiable, computed when its numbers are read.
        skew: trained, (m, K, b(b-1)/2) with K * b rotated features, or (2 l m, ...) with
            kaleidoscope = l; float32, or float64 over a float64 weight.
        scale_offset: trained, (out_features,), in the dtype of skew, the scale s minus one; or
            None.
        scale: s = 1 + scale_offset in at least float32, or None; read-only.
        config: the options, a frozen ``RotationConfig``; block_size, n_factors, side, method and
            kaleidoscope are attributes of the layer, too.

    Shape: x (..., in_features) -> (..., out_features), in the dtype of x.

    Raises:
        TypeError: an option has a wrong type, or dtype is not float64, float32, bfloat16 or
            float16.
        ValueError: an option is out of range, or no such butterfly of the rotated features exists;
            the message lists the nearest valid (n_factors, block_size).
    """

    BASE, _base_arguments = nn.Linear, _linear_arguments
    tensor_parallel = None  # the ColwiseBOFT or RowwiseBOFT that cut the parameters

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        block_size: int = 8,
        n_factors: int = 2,
        side: str = "in",
        scale: bool = True,
        p_component: float = 0.0,
        p_block: float = 0.0,
        method: str = "exact",
        kaleidoscope: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        config = RotationConfig(
            block_size=block_size,
            n_factors=n_factors,
            side=side,
            scale=scale,
            p_component=p_component,
            p_block=p_block,
            method=method,
            kaleidoscope=kaleidoscope,
        )
        self._init_rotation(config)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Self:
        """Build a BOFT layer that shares the storage of the weight and bias of ``linear``.

        Args:
            linear: any ``nn.Linear`` with torch's forward; it is not changed.
            **options: the keyword arguments of the constructor, from block_size on.

        Returns:
            The layer, in the mode (training or evaluation) of ``linear``.

        Raises:
            TypeError: ``linear`` is not an nn.Linear or has a forward of its own, or an option has
                a wrong type.
            ValueError: ``linear`` has hooks, parametrizations or no shape yet, or an option does
                not fit it.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        return cls._from_base(linear, _linear_arguments(linear), options)

    def _to_base(self, weight: nn.Parameter) -> nn.Linear:
        layer = super()._to_base(weight)
        return layer if self.tensor_parallel is None else self.tensor_parallel.plain(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tensor_parallel is not None:
            return self.tensor_parallel.call(self, x)
        if self.merged:
            self._check_trainable()
            return super().forward(x)
        own = self._parameters
        if "weight" in own and "skew" in own and "scale_offset" in own and "bias" in own:
            # as the attributes below, for which nn.Module would search at every step
            weight, skew, offset = own["weight"], own["skew"], own["scale_offset"]
            bias = own["bias"]
        else:  # FSDP puts plain tensors in the place of parameters, parametrize properties
            weight, skew, offset = self.frozen_weight, self.skew, self.scale_offset
            bias = self.bias
        checks.linear_input(x, weight)
        if not torch.compiler.is_compiling() and self.kept_weight is not None:
            y = self.kept_weight.call(self, x)
            if y is not None:
                return y
        config = self.config
        if self.strength != 1:
            skew, offset = self.at_strength()
        if skew.is_meta or (offset is not None and offset.is_meta):
            self._check_numbers(x)
        if self.n_identity:
            skew = self._active(skew)
        dropout = self._modules["dropout"]
        drop_mask = dropout.draw(skew) if self.training and dropout.p_block else None
        return rotated_linear(
            x,
            weight,
            SkewRotation(skew, config.method, drop_mask),
            scale=offset,
            scale_base=1,
            bias=bias,
            side=config.side,
            kaleidoscope=config.kaleidoscope,
        )


class OFTLinear(BOFTLinear):
    """Orthogonal finetuning with a block-diagonal R: ``BOFTLinear`` with one factor.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        block_size: any divisor of the rotated features, also an odd one.
        **options: as for ``BOFTLinear``, without n_factors.

    Shape: x (..., in_features) -> (..., out_features), in the dtype of x.

    Raises:
        TypeError, ValueError: as for ``BOFTLinear``; n_factors is a TypeError.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        block_size: int = 8,
        **options: Any,
    ) -> None:
        if "n_factors" in options:
            raise TypeError("n_factors: OFTLinear has exactly one; use BOFTLinear for more")
        super().__init__(
            in_features,
            out_features,
            bias,
            device,
            dtype,
            block_size=block_size,
            n_factors=1,
            **options,
        )
