"""BOFTConv1d, BOFTConv2d and BOFTConv3d: convolutions with a frozen kernel and a rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..ops.merge import merge_weight
from ..ops.scale import scale_of
from .base import BOFTLayer
from .config import RotationConfig

if TYPE_CHECKING:
    from typing_extensions import Self

Size = int | tuple[int, ...]


def _conv_arguments(conv: nn.Module) -> tuple:
    shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    return *shape, conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode


class _BOFTConv(BOFTLayer):
    """A convolution of any number of dimensions, which the class of torch beside it gives."""

    _base_arguments = _conv_arguments

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
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
    def from_conv(cls, conv: nn.Module, **options: Any) -> Self:
        """Build a BOFT layer that shares the storage of the weight and bias of ``conv``.

        Args:
            conv: a convolution of torch's class with its forward; it is not changed.
            **options: the keyword arguments of the constructor, from block_size on.

        Returns:
            The layer, in the mode (training or evaluation) of ``conv``.

        Raises:
            TypeError: ``conv`` is no such convolution or has a forward of its own, or an option has
                a wrong type.
            ValueError: ``conv`` has hooks, parametrizations or no shape yet, or an option does not
                fit it.
        """
        if not isinstance(conv, cls.BASE):
            expected = cls.BASE.__name__
            raise TypeError(f"conv: expected an nn.{expected}, got {type(conv).__name__}")
        return cls._from_base(conv, _conv_arguments(conv), options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            self._check_trainable()
            return super().forward(x)
        self._check_numbers(x)
        skew, offset = self.at_strength()
        blocks = self.dropout(self._blocks(skew))
        weight = merge_weight(self.frozen_weight, blocks, scale_of(offset), **self._placement)
        return self._conv_forward(x, weight, self.bias)


class BOFTConv1d(_BOFTConv, nn.Conv1d):
    """A frozen ``nn.Conv1d`` whose kernel is multiplied by an orthogonal butterfly matrix R.

    The kernel is rotated as a matrix (out_channels, in_channels/groups * kernel_size), see
    ``BOFTConv2d``.

    Args:
        in_channels ... dtype: as for ``nn.Conv1d``.
        block_size ... kaleidoscope: as for ``BOFTConv2d``.

    Shape: x (N, in_channels, L) -> (N, out_channels, L').

    Raises:
        TypeError, ValueError: as for ``BOFTLinear``.
    """

    BASE = nn.Conv1d


class BOFTConv2d(_BOFTConv, nn.Conv2d):
    """A frozen ``nn.Conv2d`` whose kernel is multiplied by an orthogonal butterfly matrix R.

    The kernel is rotated as a matrix (out_channels, in_channels/groups * kh * kw), once per call.
    Stride, padding, dilation and groups are therefore torch's own.

    Args:
        in_channels ... dtype: as for ``nn.Conv2d``.
        block_size ... kaleidoscope: as for ``BOFTLinear``; the rotated features are
            in_channels/groups * kh * kw (side "in") or out_channels (side "out").

    Shape: x (N, in_channels, H, W) -> (N, out_channels, H', W').

    Raises:
        TypeError, ValueError: as for ``BOFTLinear``.
    """

    BASE = nn.Conv2d


class BOFTConv3d(_BOFTConv, nn.Conv3d):
    """A frozen ``nn.Conv3d`` whose kernel is multiplied by an orthogonal butterfly matrix R.

    The kernel is rotated as a matrix (out_channels, in_channels/groups * kd * kh * kw), see
    ``BOFTConv2d``.

    Args:
        in_channels ... dtype: as for ``nn.Conv3d``.
        block_size ... kaleidoscope: as for ``BOFTConv2d``.

    Shape: x (N, in_channels, D, H, W) -> (N, out_channels, D', H', W').

    Raises:
        TypeError, ValueError: as for ``BOFTLinear``.
    """

    BASE = nn.Conv3d


CONVOLUTIONS = {cls.BASE: cls for cls in (BOFTConv1d, BOFTConv2d, BOFTConv3d)}
