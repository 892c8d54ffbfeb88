"""Triton kernels from skew parameters to blocks and the dense stage, and their gradient.

A butterfly of m factors mixes groups of S = b << (m - 1) features. S <= 64 keeps a group in one
program, which computes the Cayley transform of the group's blocks and then joins them factor by
factor (compose.py). So each direction is one launch, without atomics.

A step reads from global memory what the step before it wrote. That is safe: a program owns whole
groups in all factors, so its own threads wrote all of it, and a barrier makes the writes of a
program's threads visible to all of them, in global memory as in shared.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .cayley import block_size, cayley_backward_tile, cayley_tile
from .compose import join, unjoin
from .config import config_for
from .launch import COMPUTE, LAUNCHES, Launch, MeasuredTile, cdiv
from .limits import limits_of

MANY = 32  # groups for each multiprocessor, from which a program takes several


@triton.jit
def _level(ptr, level: tl.constexpr, n_blocks, first, b: tl.constexpr):
    """Pointer to a program's part of one level in the scratch memory.

    Level l holds the groups of s = b << l features, (K b / s, s, s). Levels 1, 2, ... lie one after
    another.

    Args:
        ptr: begin of level 1.
        level: l.
        n_blocks: K, blocks of a factor.
        first: first block of the program, in each factor.
        b: block size.
    """
    return ptr + n_blocks * (b * b * ((1 << level) - 2)) + first * (b * b << level)


@triton.jit(do_not_specialize=["n_blocks"])
def stage_from_skew_kernel(
    skew_ptr,
    drop_mask_ptr,
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
    """Cayley transform of all blocks and the stage they compose, G groups per program.

    S = b << (m - 1), K = n_blocks. "Compute dtype" is float64 if the skew is, else float32.

    Args:
        skew_ptr: (m, K, b(b-1)/2) strict upper triangles, row-major; any float dtype.
        drop_mask_ptr: (m, K) bool, or None.
        blocks_ptr: (m, K, b, b) result; compute dtype.
        scratch_ptr: memory for the products that are not the stage, levels 1 to m - 2 (``_level``);
            compute dtype.
        stage_ptr: (K b / S, S, S) result; compute dtype. Not written if m = 1, where the blocks are
            the stage.
        n_blocks: blocks of each factor, K.
        m: number of factors.
        b: block size.
        B: b, padded to a power of two.
        G: groups per program.
        C: blocks that the Cayley transform takes at a time.
    """
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
            None if drop_mask_ptr is None else drop_mask_ptr + block,
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
def stage_from_skew_backward_kernel(
    blocks_ptr,
    drop_mask_ptr,
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
    """Gradient of ``stage_from_skew_kernel`` with respect to the skew, G groups per program.

    S = b << (m - 1), K = n_blocks. All tensors but the mask are float32 or all are float64.

    Args:
        blocks_ptr: (m, K, b, b) blocks, as the forward made them.
        drop_mask_ptr: (m, K) bool, or None.
        grad_ptr: (splits, K b / S, S, S) partial gradients of the stage, which are summed.
        scratch_ptr: memory for the products of factors 0..l (levels 1 to m - 2), their gradients
            and the gradients of the blocks, in this order. Not used if m = 1.
        skew_grad_ptr: (m, K, b(b-1)/2) result.
        n_blocks: blocks of each factor, K.
        splits: number of partial gradients.
        split_stride: elements of one partial gradient.
        m: number of factors.
        b: block size.
        B: b, padded to a power of two.
        G: groups per program.
        C: blocks that the Cayley transform takes at a time.
    """
    packed: tl.constexpr = b * (b - 1) // 2
    P: tl.constexpr = G << (m - 1)  # blocks of each factor per program
    n_blocks = tl.cast(n_blocks, tl.int64)
    first = tl.program_id(0).to(tl.int64) * P
    present = tl.minimum(n_blocks - first, P).to(tl.int32)
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

    # With one factor, the gradient of the stage is that of the blocks.
    partial_ptr = grad_ptr if m == 1 else blocks_grad_ptr
    for i in range(m * (P // C)):
        skip = i % (P // C) * C
        block = i // (P // C) * n_blocks + first + skip
        cayley_backward_tile(
            blocks_ptr + block * (b * b),
            None if drop_mask_ptr is None else drop_mask_ptr + block,
            partial_ptr + block * (b * b),
            skew_grad_ptr + block * packed,
            present - skip,
            splits if m == 1 else 1,
            split_stride,
            b,
            B,
            C,
        )


def stage_from_skew(
    skew: torch.Tensor, drop_mask: torch.Tensor | None, *, tile: MeasuredTile = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``stage_from_skew_kernel``. The caller checks the arguments.

    Args:
        skew: (m, K, b(b-1)/2), S = b << (m - 1) <= 64.
        drop_mask: (m, K) bool, or None.
        tile: measured fields of ``StageFromSkewConfig``.

    Returns:
        Blocks (m, K, b, b) and stage (K b / S, S, S), both in float64 if the skew is, else float32.
    """
    m, n_blocks, packed = skew.shape
    b = block_size(packed)
    size = b << (m - 1)
    dtype = COMPUTE[skew.dtype]
    blocks = skew.new_empty(m, n_blocks, b, b, dtype=dtype)
    stage = blocks.new_empty(n_blocks * b // size, size, size)
    scratch = blocks.new_empty(_scratch_numel(m, n_blocks, b))
    drop_mask = None if drop_mask is None else drop_mask.contiguous()
    launch = _launch_for(skew.get_device(), "stage_from_skew", m, n_blocks, b, tile=tile)
    launch(skew.contiguous(), drop_mask, blocks, scratch, stage)
    return blocks, blocks[0].clone() if m == 1 else stage  # an op's outputs may not share memory


def stage_from_skew_backward(
    blocks: torch.Tensor,
    drop_mask: torch.Tensor | None,
    grad: torch.Tensor,
    *,
    tile: MeasuredTile = (),
) -> torch.Tensor:
    """Launch ``stage_from_skew_backward_kernel``. The caller checks the arguments.

    Args:
        blocks: (m, K, b, b), as the forward made them; S = b << (m - 1) <= 64.
        drop_mask: (m, K) bool, or None. A dropped block has no gradient.
        grad: (splits, K b / S, S, S) partial gradients of the stage, which are summed.
        tile: measured fields of ``StageFromSkewConfig``.

    Returns:
        Gradient of the skew, (m, K, b(b-1)/2), in the dtype of the blocks.
    """
    m, n_blocks, b, _ = blocks.shape
    blocks, grad = blocks.contiguous(), grad.contiguous()
    skew_grad = blocks.new_empty(m, n_blocks, b * (b - 1) // 2)
    n_scratch = 0 if m == 1 else 2 * _scratch_numel(m, n_blocks, b) + blocks.numel()
    scratch = blocks.new_empty(n_scratch)
    drop_mask = None if drop_mask is None else drop_mask.contiguous()
    sums = grad.shape[0], n_blocks * b * (b << (m - 1))
    device = blocks.get_device()
    launch = _launch_for(device, "stage_from_skew_backward", m, n_blocks, b, *sums, tile=tile)
    launch(blocks, drop_mask, grad, scratch, skew_grad)
    return skew_grad


def _scratch_numel(m: int, n_blocks: int, b: int) -> int:
    """Elements of the products that are neither the first factor nor the stage (``_level``)."""
    return n_blocks * b * b * max(0, (1 << (m - 1)) - 2)


@lru_cache(LAUNCHES)
def _launch_for(
    device: int, op: str, m: int, n_blocks: int, b: int, *scalars: int, tile: MeasuredTile
) -> Launch:
    kernel = stage_from_skew_kernel if op == "stage_from_skew" else stage_from_skew_backward_kernel
    many = n_blocks >> (m - 1) >= MANY * limits_of(device).multiprocessors
    config = config_for(op, m=m, b=b, many=many)._replace(**dict(tile))
    constants = {"m": m, "b": b, "B": config.B, "G": config.G, "C": config.C}
    grid = cdiv(n_blocks, config.G << (m - 1))
    scalars = n_blocks, *scalars
    return Launch(kernel, grid, scalars, constants, config.num_warps, device=device)
