"""The butterfly matrices of many layers as dense groups, all of them in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._runtime import checks
from .._runtime.limits import MAX_ROTATION
from .stage_from_skew import StageFromSkew


def butterfly_groups(
    skews: Sequence[torch.Tensor], drop_masks: Sequence[torch.Tensor | None] | None = None
) -> list[torch.Tensor]:
    """The butterfly matrix R of each skew as its dense groups, all of them in one launch.

    R with m factors of block size b is block-diagonal: it mixes consecutive features in groups of
    S = b 2^(m-1). Cayley transform, dropout and the product of the m factors are done at once. The
    skews are concatenated along K, so many small layers cost one launch forward and one backward.
    Each result fits ``boft_linear(..., rotation=...)``. Gradients of gradients are supported.

    Equivalent to ``cayley(skew)`` with the identity in place of the dropped blocks, multiplied out:
    ``torch.block_diag(*groups)`` is ``butterfly_matmul(torch.eye(K * b), blocks)``.

    Args:
        skews: (m, K, b(b-1)/2) each, packed as for ``cayley``: of one floating dtype, on one
            device, with one m and one b, any K. S is at most 64.
        drop_masks: for each skew a boolean (m, K), true where the block is to be the identity,
            or None. None for all of them drops nothing.

    Returns:
        For each skew its groups, (K b / S, S, S), in the wider of float32 and the dtype of the
        skews. An empty list for no skews.

    Raises:
        TypeError: a skew is not a floating-point tensor, a mask is not a boolean one, or the
            dtypes of the skews differ.
        ValueError: shapes or devices differ, no butterfly has this shape, or S > 64.
    """
    skews = list(skews)
    drop_masks = [None] * len(skews) if drop_masks is None else list(drop_masks)
    if len(drop_masks) != len(skews):
        raise ValueError(
            f"drop_masks: expected {len(skews)} masks, as there are skews, got {len(drop_masks)}"
        )
    for i, (skew, drop_mask) in enumerate(zip(skews, drop_masks, strict=True)):
        _check(f"skews[{i}]", skew, skews[0])
        if drop_mask is not None:
            _check_mask(f"drop_masks[{i}]", drop_mask, skew)
    if not skews:
        return []
    mask = None
    if any(drop_mask is not None for drop_mask in drop_masks):
        masks = [
            skew.new_zeros(skew.shape[:2], dtype=torch.bool) if drop_mask is None else drop_mask
            for skew, drop_mask in zip(skews, drop_masks, strict=True)
        ]
        mask = torch.cat(masks, 1)
    groups = StageFromSkew.apply(torch.cat(skews, 1) if len(skews) > 1 else skews[0], mask)
    m = len(skews[0])
    return list(groups.split([skew.shape[1] >> (m - 1) for skew in skews]))


def _check_mask(name: str, drop_mask: object, skew: torch.Tensor) -> None:
    expected = tuple(skew.shape[:2])
    if not isinstance(drop_mask, torch.Tensor) or drop_mask.dtype != torch.bool:
        got = drop_mask.dtype if isinstance(drop_mask, torch.Tensor) else type(drop_mask).__name__
        raise TypeError(f"{name}: expected a boolean tensor or None, got {got}")
    if drop_mask.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(drop_mask.shape)}")
    checks.same_device(name, drop_mask, "its skew", skew)


def _check(name: str, skew: torch.Tensor, first: torch.Tensor) -> None:
    checks.tensor(name, skew)
    if skew.dim() != 3 or skew.shape[::2] != first.shape[::2]:
        raise ValueError(
            f"{name}: expected shape (n_factors, d/block_size, block_size*(block_size-1)/2) with "
            f"the first and last size of skews[0], {tuple(first.shape)}, got {tuple(skew.shape)}"
        )
    if skew.dtype != first.dtype:
        raise TypeError(f"{name}: expected the dtype of skews[0], {first.dtype}, got {skew.dtype}")
    checks.same_device(name, skew, "skews[0]", first)
    m, n_blocks, packed = skew.shape
    b = checks.block_size_from_packed(name, packed)
    checks.butterfly_shape(n_blocks * b, b, m)
    if b << (m - 1) > MAX_ROTATION:
        raise ValueError(
            f"{name}: expected groups of block_size * 2**(n_factors-1) <= {MAX_ROTATION} features, "
            f"got {b << (m - 1)}"
        )
