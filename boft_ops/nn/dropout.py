"""Multiplicative dropout as a module (arXiv 2311.06243, section 4.2)."""

from __future__ import annotations

import torch
from torch import nn

from .._runtime import checks
from ..ops.dropout import draw_mask, multiplicative_dropout


class MultiplicativeDropout(nn.Module):
    """``multiplicative_dropout`` as a module: active in training, the identity in evaluation.

    Args:
        p_component: share of the butterfly factors to choose, in [0, 1].
        p_block: share of the blocks to replace in each chosen factor, in [0, 1].

    Shape: blocks (m, K, b, b) -> (m, K, b, b).

    Raises:
        TypeError: a share is not a number.
        ValueError: a share is outside [0, 1].
    """

    def __init__(self, p_component: float = 0.0, p_block: float = 0.0) -> None:
        super().__init__()
        checks.probability("p_component", p_component)
        checks.probability("p_block", p_block)
        self.p_component, self.p_block = p_component, p_block

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return ``blocks`` with random ones replaced by the identity, in training mode."""
        return multiplicative_dropout(
            blocks, self.p_component, self.p_block, training=self.training
        )

    def draw(self, skew: torch.Tensor) -> torch.Tensor | None:
        """Draw the boolean mask of the blocks to drop in one forward pass.

        Args:
            skew: (..., m, K, b(b-1)/2); its shape and device are used.

        Returns:
            The mask (..., m, K), of each rotation on its own; None if there is nothing to drop.
        """
        if not self.training or not self.p_component or not self.p_block:
            return None
        *batch, m, n_blocks, _ = skew.shape
        shares = self.p_component, self.p_block
        return draw_mask(m, n_blocks, *shares, skew.device, None, tuple(batch))

    def extra_repr(self) -> str:
        return f"p_component={self.p_component}, p_block={self.p_block}"
