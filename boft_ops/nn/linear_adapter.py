"""The trained parameters of one adapter of a ``MultiAdapterLinear``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .._runtime import checks
from ..ops.rotation import SkewRotation
from .adapter_parameters import HasAdapter
from .config import RotationConfig
from .distributed import averaged, replicated
from .dropout import MultiplicativeDropout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class LinearAdapter(HasAdapter, nn.Module):
    """The rotation of a linear layer's inputs and the scale of its outputs, without the layer.

    Args:
        in_features: number of rotated features, K * b.
        out_features: length n of the scale.
        config: the options; side must be "in" and kaleidoscope 0.
        device, dtype: of the parameters; dtype is float32 by default.

    Attributes:
        config: as given.
        skew: trainable (m, K, b(b-1)/2), initialized to zeros.
        scale_offset: trainable (n,), the scale minus one, initialized to zeros, or None.
        scale: 1 + scale_offset in at least float32, or None; read-only.

    Raises:
        TypeError: dtype is not a floating-point dtype.
        ValueError: the config does not fit the features or a base that is only called.
    """

    merged, n_identity = False, 0  # attributes of BOFTLayer, which never change here
    is_cut = False  # True if tensor parallelism has made the parameters DTensors
    base_class = "Linear"  # or "Conv1D", of transformers, whose weight is transposed

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: RotationConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for name, expected in (("side", "in"), ("kaleidoscope", 0)):
            if (got := getattr(config, name)) != expected:
                raise ValueError(
                    f"{name}: expected {expected!r} over a base that is only called, got {got!r}"
                )
        checks.floating_dtype("dtype", dtype)
        config.check_features(in_features)
        self.config, self.out_features = config, out_features
        self.rotated_features = in_features
        self.dropout = MultiplicativeDropout(config.p_component, config.p_block)
        skew = torch.zeros(config.skew_shape(in_features), device=device, dtype=dtype)
        offset = torch.zeros(out_features, device=device, dtype=dtype)
        self.skew = nn.Parameter(skew)
        self.register_parameter("scale_offset", nn.Parameter(offset) if config.scale else None)

    reset_parameters = HasAdapter.reset_adapter  # the name by which torch initializes a module

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self._check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def own_skew(self) -> torch.Tensor:
        """The skew at its strength, plain: the blocks of this rank if tensor parallelism cut it.

        The gradient of one that every rank has is averaged over the ranks.
        """
        return self._own(self.skew if self.strength == 1 else self.at_strength()[0])

    def own_offset(self) -> torch.Tensor | None:
        """The scale_offset at its strength as a plain tensor, or None; see ``own_skew``."""
        offset = self.scale_offset if self.strength == 1 else self.at_strength()[1]
        return None if offset is None else self._own(offset)

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if self.is_cut else averaged(tensor)

    def replicate(self, mesh: DeviceMesh) -> None:
        """Make each parameter one of all ranks of a mesh, on which it is equal."""
        for name, parameter in list(self.named_parameters(recurse=False)):
            self.register_parameter(name, replicated(parameter, mesh))

    def blocks(self, n_factors: int = 0) -> torch.Tensor:
        """Orthogonal blocks (m, K, b, b), after dropout in training mode.

        If m < n_factors, identity factors are appended, so that the blocks of adapters with
        different m can be stacked.
        """
        skew = self.own_skew()
        if self.is_cut:
            from .cuts import shared_drop_mask  # imports torch.distributed.tensor

            drop_mask = shared_drop_mask(self)
        else:
            drop_mask = self.dropout.draw(skew)
        blocks = SkewRotation(skew, self.config.method, drop_mask).blocks()
        missing = n_factors - len(blocks)
        if missing <= 0:
            return blocks
        eye = torch.eye(self.config.block_size, dtype=blocks.dtype, device=blocks.device)
        return torch.cat([blocks, eye.expand(missing, *blocks.shape[1:])])

    def describe_base(self) -> tuple[str, int]:
        """The class name of the layer that is rotated, and the number n of its outputs."""
        return self.base_class, self.out_features

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items() if value)
