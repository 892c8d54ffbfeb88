"""Skew parameters -> blocks and the dense stage in one launch, and its gradient in another.

A butterfly of m factors mixes groups of S = b << (m - 1) features, and S <= 64 keeps a group in one
program: it computes the Cayley transform of the group's blocks, then joins them factor by factor
(compose.py).

What one step writes the next reads back from global memory. A program owns whole groups, in all
factors, so all of it was written by its own threads, and a barrier makes the writes of a program's
threads visible to all of them, in global memory as in shared. No launch in between, no atomics.
"""

import torch
import triton
import triton.language as tl

from .cayley import block_size, cayley_backward_tile, cayley_tile
from .compose import join, unjoin
from .config import config_for, tuned
from .launch import Launch, cdiv, remembered


@triton.jit
def _level(ptr, level: tl.constexpr, n_blocks, first, b: tl.constexpr):
    """A program's part of level ``level`` in a scratch of several.

    A level is the groups of s = b << level features, (K b / s, s, s); levels 1, 2, ... lie one
    after another.
    """
    return ptr + n_blocks * (b * b * ((1 << level) - 2)) + first * (b * b << level)


@triton.jit(do_not_specialize=["n_blocks"])
def rotation_kernel(
    skew_ptr,
    drop_ptr,
    blocks_ptr,
    scratch_ptr,
    stage_ptr,
    n_blocks,
    m: tl.constexpr,
    b: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
):
    packed: tl.constexpr = b * (b - 1) // 2
    P: tl.constexpr = G << (m - 1)  # blocks of each factor per program
    n_blocks = tl.cast(n_blocks, tl.int64)
    first = tl.program_id(0).to(tl.int64) * P
    present = tl.minimum(n_blocks - first, P).to(tl.int32)
    for i in range(m * (P // C)):
        skip = i % (P // C) * C
        block = i // (P // C) * n_blocks + first + skip
        cayley_tile(
            skew_ptr + block * packed,
            None if drop_ptr is None else drop_ptr + block,
            blocks_ptr + block * (b * b),
            present - skip,
            b,
            B,
            C,
        )

    unit = tl.arange(0, 2 * P)
    inner_ptr = blocks_ptr + first * (b * b)
    for level in tl.static_range(1, m):
        tl.debug_barrier()  # the inner groups are written
        outer_ptr = (
            stage_ptr + first * (b * b << level)
            if level == m - 1
            else _level(scratch_ptr, level, n_blocks, first, b)
        )
        join(
            blocks_ptr + (level * n_blocks + first) * (b * b),
            inner_ptr,
            outer_ptr,
            unit,
            2 * present,
            0,
            b,
            b << (level - 1),
            B,
            B << (level - 1),
        )
        inner_ptr = outer_ptr


@triton.jit(do_not_specialize=["n_blocks", "splits"])
def rotation_backward_kernel(
    blocks_ptr,
    drop_ptr,
    grad_ptr,
    scratch_ptr,
    skew_grad_ptr,
    n_blocks,
    splits,
    split_stride,
    m: tl.constexpr,
    b: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
):
    packed: tl.constexpr = b * (b - 1) // 2
    P: tl.constexpr = G << (m - 1)  # blocks of each factor per program
    n_blocks = tl.cast(n_blocks, tl.int64)
    first = tl.program_id(0).to(tl.int64) * P
    present = tl.minimum(n_blocks - first, P).to(tl.int32)
    # scratch: the products of factors 0..level, their gradients, the gradients of the blocks
    grads_ptr = scratch_ptr + n_blocks * (b * b * ((1 << (m - 1)) - 2))
    blocks_grad_ptr = grads_ptr + n_blocks * (b * b * ((1 << (m - 1)) - 2))

    unit = tl.arange(0, 2 * P)
    factor_ptr = blocks_ptr + first * (b * b)
    inner_ptr = factor_ptr
    for level in tl.static_range(1, m - 1):
        outer_ptr = _level(scratch_ptr, level, n_blocks, first, b)
        join(
            blocks_ptr + (level * n_blocks + first) * (b * b),
            inner_ptr,
            outer_ptr,
            unit,
            2 * present,
            0,
            b,
            b << (level - 1),
            B,
            B << (level - 1),
        )
        tl.debug_barrier()  # the next level's inner groups are written
        inner_ptr = outer_ptr
    outer_grad_ptr = grad_ptr + first * (b * b << (m - 1))
    for level in tl.static_range(m - 1, 0, -1):
        block = level * n_blocks + first
        if level == 1:
            inner_ptr = factor_ptr
            inner_grad_ptr = blocks_grad_ptr + first * (b * b)
        else:
            inner_ptr = _level(scratch_ptr, level - 1, n_blocks, first, b)
            inner_grad_ptr = _level(grads_ptr, level - 1, n_blocks, first, b)
        unjoin(
            blocks_ptr + block * (b * b),
            inner_ptr,
            outer_grad_ptr,
            blocks_grad_ptr + block * (b * b),
            inner_grad_ptr,
            unit,
            2 * present,
            0,
            splits if level == m - 1 else 1,
            split_stride,
            b,
            b << (level - 1),
            B,
            B << (level - 1),
        )
        tl.debug_barrier()  # the next outer gradients, in the end those of the blocks, are written
        outer_grad_ptr = inner_grad_ptr

    # One factor is its own stage, and nothing is written yet.
    partial_ptr = grad_ptr if m == 1 else blocks_grad_ptr
    for i in range(m * (P // C)):
        skip = i % (P // C) * C
        block = i // (P // C) * n_blocks + first + skip
        cayley_backward_tile(
            blocks_ptr + block * (b * b),
            None if drop_ptr is None else drop_ptr + block,
            partial_ptr + block * (b * b),
            skew_grad_ptr + block * packed,
            present - skip,
            splits if m == 1 else 1,
            split_stride,
            b,
            B,
            C,
        )


def rotation(skew: torch.Tensor, drop: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Skew (m, K, b(b-1)/2) and mask (m, K) or None -> blocks (m, K, b, b), stage (K b / S, S, S).

    Both in float32, or float64 if skew is; S = b << (m - 1) <= 64; checked by the caller.
    """
    m, n_blocks, packed = skew.shape
    b = block_size(packed)
    size = b << (m - 1)
    dtype = torch.promote_types(skew.dtype, torch.float32)
    blocks = skew.new_empty(m, n_blocks, b, b, dtype=dtype)
    stage = blocks.new_empty(n_blocks * b // size, size, size)
    scratch = blocks.new_empty(_levels(m, n_blocks, b))
    drop = None if drop is None else drop.contiguous()
    launch = _launch_of("stage_from_skew", skew.get_device(), skew.dtype, m, n_blocks, b)
    launch(skew.contiguous(), drop, blocks, scratch, stage)
    return blocks, blocks[0].clone() if m == 1 else stage  # an op's outputs may not share memory


def rotation_backward(
    blocks: torch.Tensor, drop: torch.Tensor | None, grad: torch.Tensor
) -> torch.Tensor:
    """Blocks, mask, (splits, K b / S, S, S) -> (m, K, b(b-1)/2), S <= 64; checked by the caller.

    The gradient of the stage is the sum of ``grad`` over its first dimension. A dropped block has
    none.
    """
    m, n_blocks, b, _ = blocks.shape
    blocks, grad = blocks.contiguous(), grad.contiguous()
    skew_grad = blocks.new_empty(m, n_blocks, b * (b - 1) // 2)
    n_scratch = 0 if m == 1 else 2 * _levels(m, n_blocks, b) + blocks.numel()
    scratch = blocks.new_empty(n_scratch)
    drop = None if drop is None else drop.contiguous()
    sums = grad.shape[0], n_blocks * b * (b << (m - 1))
    launch = _launch_of(
        "stage_from_skew_backward", blocks.get_device(), blocks.dtype, m, n_blocks, b, *sums
    )
    launch(blocks, drop, grad, scratch, skew_grad)
    return skew_grad


def _levels(m: int, n_blocks: int, b: int) -> int:
    """Numbers in the products that are neither the first factor nor the stage (``_level``)."""
    return n_blocks * b * b * max(0, (1 << (m - 1)) - 2)


@remembered
def _launch_of(
    op: str, device: int, dtype: torch.dtype, m: int, n_blocks: int, b: int, *scalars: int
) -> Launch:
    kernel = rotation_kernel if op == "stage_from_skew" else rotation_backward_kernel
    config = tuned(config_for(op, m=m, b=b), op, device, dtype, (m, b), (n_blocks,))
    constants = {"m": m, "b": b, "B": config.B, "G": config.G, "C": config.C}
    grid = cdiv(n_blocks, config.G << (m - 1))
    return Launch(kernel, grid, (n_blocks, *scalars), constants, config.num_warps)
