"""Multiplicative dropout (arXiv 2311.06243, section 4.2): blocks become the identity at random."""

from __future__ import annotations

import math

import torch

from .._runtime import checks


def multiplicative_dropout(
    blocks: torch.Tensor,
    p_component: float,
    p_block: float,
    *,
    training: bool,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Replace random blocks of random butterfly factors by the identity.

    Exactly ``floor(p_component * m)`` of the m factors are chosen and, in each of them,
    ``floor(p_block * K)`` of its K blocks become the identity. Nothing is rescaled: the product
    stays orthogonal. The mask is drawn on the device of ``blocks`` from torch's generator (or
    ``generator``), without a host sync, so seeding and activation checkpointing reproduce it. The
    gradient of a replaced block is zero.

    Equivalent to ``torch.where(mask[..., None, None], torch.eye(b), blocks)`` for that mask (m, K).

    Args:
        blocks: (m, K, b, b), floating point.
        p_component: share of the factors to choose, in [0, 1].
        p_block: share of the blocks to replace in each chosen factor, in [0, 1].
        training: if False, ``blocks`` is returned unchanged.
        generator: source of randomness, on the device of ``blocks``; None is torch's default one.

    Returns:
        (m, K, b, b); ``blocks`` itself where there is nothing to drop.

    Raises:
        TypeError: ``blocks`` is not a floating-point tensor, or a share is not a number.
        ValueError: wrong shape, or a share outside [0, 1].
    """
    checks.tensor("blocks", blocks)
    checks.probability("p_component", p_component)
    checks.probability("p_block", p_block)
    if blocks.dim() != 4 or blocks.shape[-1] != blocks.shape[-2]:
        raise ValueError(
            "blocks: expected shape (n_factors, d/block_size, block_size, block_size), "
            f"got {tuple(blocks.shape)}"
        )
    if not training:
        return blocks
    m, n_blocks = blocks.shape[:2]
    drop_mask = draw_mask(m, n_blocks, p_component, p_block, blocks.device, generator)
    return drop_blocks(blocks, drop_mask)


def drop_blocks(blocks: torch.Tensor, drop_mask: torch.Tensor | None) -> torch.Tensor:
    """Blocks (..., b, b), with the identity where the drop mask (...) is true."""
    if drop_mask is None:
        return blocks
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return torch.where(drop_mask[..., None, None], eye, blocks)


def draw_mask(
    m: int,
    n_blocks: int,
    p_component: float,
    p_block: float,
    device: torch.device,
    generator: torch.Generator | None,
    batch: tuple[int, ...] = (),
) -> torch.Tensor | None:
    """Random drop masks, boolean (*batch, m, n_blocks); None if no block is to be dropped."""
    n_components, n_dropped = count(p_component, m), count(p_block, n_blocks)
    if n_components == 0 or n_dropped == 0:
        return None
    drop_mask = _draw((*batch, m, n_blocks), n_dropped, device, generator)
    if n_components < m:
        drop_mask = drop_mask & _draw((*batch, m), n_components, device, generator)[..., None]
    return drop_mask


def count(p: float, n: int) -> int:
    """floor(p n), also if p n is whole in decimal alone: 0.29 * 100 is 28.999999999999996."""
    return math.floor(p * n + 1e-9)


def _draw(
    shape: tuple[int, ...], count: int, device: torch.device, generator: torch.Generator | None
) -> torch.Tensor:
    """Boolean mask with exactly ``count`` True, uniformly placed, along the last dimension."""
    noise = torch.rand(shape, device=device, generator=generator)
    return noise.argsort(-1) < count  # a random permutation of 0..n-1, ties included
