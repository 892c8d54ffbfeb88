"""The op of the rotated linear layer, and its backward, as a sequence of launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def batch(
    rotate: Callable, rotate_backward: Callable, scale_rows: Callable, scale_backward: Callable
) -> tuple[Callable, Callable]:
    """Return the op and its backward as a sequence of these functions and torch's products."""

    def rotated_linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        stage: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        bias_in_z: bool,
        save: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        center = bias if bias_in_z else None
        z = F.linear(rotate(x, stage, stage.shape[-1], 1, False), weight, center)
        if scale is not None:
            y = scale_rows(z, scale, center, bias)
        else:
            y = z if bias is center else z + bias
        return y, z if save and scale is not None else z.new_empty(0, z.shape[1])

    def rotated_linear_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        stage: torch.Tensor,
        scale: torch.Tensor | None,
        center: torch.Tensor | None,
        z: torch.Tensor | None,
        splits: int,
        need_bias: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        if z is not None:
            grad, scale_grad, bias_grad = scale_backward(grad, z, scale, center)
        else:
            scale_grad = stage.new_empty(0)
            bias_grad = grad.sum(0) if need_bias else grad.new_empty(0)
            if scale is not None:
                grad = scale_rows(grad, scale, None, None)
        layout = stage.shape[-1], 1, False
        x_grad, stage_grad = rotate_backward(grad @ weight, x, stage, *layout, splits)
        return x_grad, stage_grad, scale_grad, bias_grad

    return rotated_linear, rotated_linear_backward
