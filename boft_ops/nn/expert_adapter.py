"""The trained parameters of one projection of a layer of experts."""

from __future__ import annotations

import torch
from torch import nn

from .._runtime import checks
from ..ops.butterfly import butterfly_matmul
from ..ops.rotate_indexed import butterfly_matmul_segments
from ..ops.rotation import SkewRotation
from .config import Options, RotationConfig
from .linear_adapter import LinearAdapter

SHARED, EACH = "shared", "each"
MODES = EACH, SHARED


class ExpertAdapter(LinearAdapter):
    """The rotation of the inputs of E experts' projections, and the scale of their outputs.

    Args:
        n_experts: number E of experts.
        in_features, out_features: inputs and outputs of the projection of one expert.
        experts: "each" trains a rotation and a scale for every expert, "shared" one for all.
        config: the options; side must be "in" and kaleidoscope 0.
        device, dtype: of the parameters.

    Attributes:
        skew: trainable (E, m, K, b(b-1)/2), or (m, K, b(b-1)/2) if it is shared; zeros at first.
        scale_offset: trainable (E, n), or (n,) if it is shared; zeros at first, a scale of one; or
            None.
        is_part: True if E counts only the experts of this process.

    Raises:
        TypeError: dtype is not a floating-point dtype.
        ValueError: the config does not fit.
    """

    is_part = False

    def __init__(
        self,
        n_experts: int,
        in_features: int,
        out_features: int,
        experts: str,
        config: RotationConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(in_features, out_features, config, device=device, dtype=dtype)
        checks.choice("experts", experts, MODES)
        self.experts = experts
        if experts == EACH:
            self.skew = nn.Parameter(self.skew.detach().new_zeros(n_experts, *self.skew.shape))
            if self.scale_offset is not None:
                zeros = self.scale_offset.detach().new_zeros(n_experts, out_features)
                self.scale_offset = nn.Parameter(zeros)

    @property
    def whole_skew_shape(self) -> tuple[int, ...]:
        shape = super().whole_skew_shape
        return shape if self.experts == SHARED else (len(self.skew), *shape)

    def options(self) -> Options:
        """The keyword arguments that make another adapter like this one."""
        return super().options() | {"experts": self.experts}

    def describe_base(self) -> tuple[str, int]:
        """The class name "Experts", and the number n of the outputs of each."""
        return "Experts", self.out_features

    def blocks(self) -> torch.Tensor:
        """Orthogonal blocks (E, m, K, b, b) or (m, K, b, b), after dropout in training mode."""
        drop_mask = self.dropout.draw(self.skew)
        return SkewRotation(self.at_strength()[0], self.method, drop_mask).blocks()

    def rotate(self, x: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
        """x R for rows x (N, d), with the R of each row's expert.

        Args:
            x: rows, sorted by expert.
            offsets: int32 (E,), the end of each expert's rows; None if the rotation is shared.
        """
        if self.experts == SHARED:
            return butterfly_matmul(x, self.blocks())
        return butterfly_matmul_segments(x, self.blocks(), offsets)
