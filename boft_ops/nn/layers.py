"""Thin modules over the functions: torch's own layers with a frozen weight and a rotation."""

from __future__ import annotations

import torch
from torch import nn

from .._runtime import checks
from ..ops.linear import rotated_linear
from ..ops.rotation import SkewRotation
from .base import BOFTLayer


class BOFTLinear(BOFTLayer, nn.Linear):
    """A frozen ``nn.Linear`` multiplied by a trainable orthogonal butterfly matrix R.

    y = s * (x R W^T) + bias (side "in") or s * ((x W^T) R^T) + bias (side "out"), as
    ``boft_linear``; arXiv 2311.06243, sections 3 and 4. It starts as the frozen layer, bit for bit.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        block_size: b; must divide the rotated features, and be even if n_factors > 1.
        n_factors: m butterfly factors; the number of blocks must be a multiple of 2**(m-1).
        side: rotate the inputs ("in", the default) or the outputs ("out").
        scale: train a factor for each output as well.
        p_component, p_block: multiplicative dropout in training, see ``multiplicative_dropout``.
        method: "exact" or "neumann5", see ``cayley``.
        kaleidoscope: l levels of the generalised R_G = R_{l,1} R_{l,2}^T ... R_{1,1} R_{1,2}^T
            (see ``kaleidoscope_matmul``) in the place of R, all BOFT(n_factors, block_size); 0 is
            the butterfly R itself.

    Shape: x (..., in_features) -> (..., out_features).

    Raises:
        TypeError, ValueError: an option is not valid; the message lists the nearest valid
            (n_factors, block_size).
    """

    BASE = nn.Linear

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
        self._init_rotation(
            *(block_size, n_factors, side, scale, p_component, p_block, method, kaleidoscope)
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> BOFTLinear:
        """Wrap a linear layer, sharing the storage of its weight and bias.

        Args:
            linear: any ``nn.Linear``; it is not changed.
            **options: the keyword arguments of the constructor, from block_size on.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        return cls._from_base(linear, _linear_arguments(linear), options)

    def merged_layer(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the merged weight, frozen, and the bias of this layer."""
        return self._to_base(_linear_arguments(self))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            self._check_trainable()
            return super().forward(x)
        checks.linear_input(x, self.weight)
        skew = self._active(self.skew) if self.n_identity else self.skew
        drop_mask = self.dropout.draw(skew) if self.training and self.dropout.p_block else None
        return rotated_linear(
            x,
            self.weight,
            SkewRotation(skew, self.method, drop_mask),
            scale=self.scale,
            bias=self.bias,
            side=self.side,
            kaleidoscope=self.kaleidoscope,
        )


class OFTLinear(BOFTLinear):
    """Orthogonal finetuning with a block-diagonal R: ``BOFTLinear`` with one factor.

    Any block_size that divides the rotated features will do, odd ones too.
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
        **options,
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


class BOFTConv2d(BOFTLayer, nn.Conv2d):
    """A frozen ``nn.Conv2d`` with its kernel, as (out, in/groups * kh * kw), rotated.

    The kernel is rotated once per call, so stride, padding, dilation and groups are torch's own.

    Args:
        in_channels ... dtype: as for ``nn.Conv2d``.
        block_size ... kaleidoscope: as for ``BOFTLinear``; features are in/groups * kh * kw (side
            "in") or out_channels (side "out").

    Shape: x (N, in_channels, H, W) -> (N, out_channels, H', W').
    """

    BASE = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
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
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._init_rotation(
            *(block_size, n_factors, side, scale, p_component, p_block, method, kaleidoscope)
        )

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **options) -> BOFTConv2d:
        """Wrap a convolution, sharing the storage of its weight and bias.

        Args:
            conv: any ``nn.Conv2d``; it is not changed.
            **options: the keyword arguments of the constructor, from block_size on.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: expected an nn.Conv2d, got {type(conv).__name__}")
        return cls._from_base(conv, _conv_arguments(conv), options)

    def merged_layer(self) -> nn.Conv2d:
        """A plain ``nn.Conv2d`` with the merged weight, frozen, and the bias of this layer."""
        return self._to_base(_conv_arguments(self))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            self._check_trainable()
            return super().forward(x)
        rotated = self._rotate_matrix(self._matrix(), self.dropout(self._blocks()))
        if self.scale is not None:
            rotated = rotated * self.scale.to(rotated.dtype)[:, None]
        return self._conv_forward(x, rotated.reshape(self.weight.shape), self.bias)


def _linear_arguments(linear: nn.Linear) -> tuple:
    return linear.in_features, linear.out_features, linear.bias is not None


def _conv_arguments(conv: nn.Conv2d) -> tuple:
    shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    return *shape, conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode
