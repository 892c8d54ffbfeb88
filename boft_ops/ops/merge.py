"""Merging a rotation and a scale into a weight, and taking them out again (docs/layers.md).

Everything that rotates a weight W, seen as a matrix (n, d), computes it here:
W' = diag(s) W R^T for a rotation of the inputs, W' = diag(s) R W for one of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import TypeVar

import torch

from .._runtime import autocast, linalg
from .._runtime.dtypes import widest
from .kaleidoscope import multiply

Method = TypeVar("Method", bound=Callable)


def untracked(method: Method) -> Method:
    """Decorator: run a method of a layer without autograd, inference mode and autocast.

    Methods that replace or inspect weights need it.
    A weight made in inference mode could not be trained around later.
    """

    @wraps(method)
    def wrapper(self, *args, **kwargs):
        no_autocast = autocast.disabled(next(self.parameters()).device.type)
        with torch.inference_mode(False), torch.no_grad(), no_autocast:
            return method(self, *args, **kwargs)

    return wrapper


def rotate_weight(
    matrix: torch.Tensor,
    blocks: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    side: str = "in",
    kaleidoscope: int = 0,
) -> torch.Tensor:
    """diag(s) W R^T (side "in") or diag(s) R W (side "out"), differentiable, in the dtype of W.

    Args:
        matrix: W, (n, d), floating point.
        blocks: (m, K, b, b) of R, or (2 l m, K, b, b) with kaleidoscope = l.
        scale: s, (n,), or None for ones.
        side: "in" or "out".
        kaleidoscope: number of levels l; 0 is a single butterfly.

    Returns:
        (n, d).
    """
    rotated = _multiply(matrix, blocks, side, kaleidoscope, transpose=True)
    return rotated if scale is None else rotated * scale[:, None].to(rotated.dtype)


def merge_weight(
    weight: torch.Tensor,
    blocks: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    side: str = "in",
    kaleidoscope: int = 0,
) -> torch.Tensor:
    """``rotate_weight`` computed in at least float32 and rounded once.

    Args:
        weight: (n, ...), for example the kernel of a convolution; it is seen as (n, d).
        blocks, scale, side, kaleidoscope: see ``rotate_weight``.

    Returns:
        The shape and dtype of ``weight``.
    """
    matrix = _as_matrix(weight, blocks)
    rotated = rotate_weight(matrix, blocks, scale, side=side, kaleidoscope=kaleidoscope)
    return rotated.to(weight.dtype).reshape(weight.shape)


def merge_rotations(
    weight: torch.Tensor, rotations: Iterable[tuple[torch.Tensor, torch.Tensor | None]]
) -> torch.Tensor:
    """``merge_weight`` for several rotations of the inputs, rounded once after the last.

    Args:
        weight: (n, ...).
        rotations: blocks and scale of each, in the order in which the weight meets them: an input
            meets the last one first.

    Returns:
        The shape and dtype of ``weight``.
    """
    wide = weight.to(widest(weight.dtype))
    for blocks, scale in rotations:
        wide = merge_weight(wide, blocks, scale)
    return wide.to(weight.dtype)


def unmerge_weight(
    weight: torch.Tensor,
    blocks: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    orthogonal: bool = True,
    side: str = "in",
    kaleidoscope: int = 0,
) -> torch.Tensor:
    """Undo ``merge_weight``, up to the rounding of the dtype of ``weight``.

    Args:
        weight: the merged weight, (n, ...).
        blocks, scale, side, kaleidoscope: those that were merged.
        orthogonal: False for blocks of a truncated series, whose inverse is not the transpose.

    Returns:
        The shape and dtype of ``weight``, contiguous.

    Raises:
        ValueError: ``scale`` holds a zero, which no division undoes.
    """
    matrix = _as_matrix(weight, blocks)
    if scale is not None:
        if (scale == 0).any():
            raise ValueError("scale: expected no zero in order to unmerge, got some")
        matrix = matrix / scale[:, None].to(matrix.dtype)
    blocks = blocks.to(matrix.dtype)
    if not orthogonal:
        blocks = linalg.inverse(blocks).mT
    matrix = _multiply(matrix, blocks, side, kaleidoscope, transpose=False)
    return matrix.to(weight.dtype).reshape(weight.shape).contiguous()


def _multiply(
    matrix: torch.Tensor, blocks: torch.Tensor, side: str, kaleidoscope: int, transpose: bool
) -> torch.Tensor:
    """W R^T (side "in") or R W (side "out") if ``transpose``, else W R or R^T W."""
    if side == "in":
        return multiply(matrix, blocks, kaleidoscope, transpose=transpose)
    return multiply(matrix.mT, blocks, kaleidoscope, transpose=transpose).mT


def _as_matrix(weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    return weight.flatten(1).to(widest(weight.dtype, blocks.dtype))
