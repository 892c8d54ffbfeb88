"""Triton kernels of the Cayley transform and its gradient.

A program holds G blocks of B x B in registers, B being the block size b padded to a power of two.
The padding is the identity and never mixes with the rest. Arithmetic is in float64, because a
float32 elimination would need a residual step and still be off by |Q| times as much. tl.dot is not
used, because its least sizes would rule out b < 16.

A drop mask selects blocks for multiplicative dropout: a dropped block is the identity and has no
gradient. Without dropout, drop_mask_ptr is None, a constant of the compiled kernel.
"""

from functools import cache, lru_cache

import torch
import triton
import triton.language as tl

from .config import MAX_BLOCK_SIZE, config_for
from .launch import LAUNCHES, Launch, MeasuredTile, cdiv


@triton.jit
def _load(pointer, mask):
    """Load as float64, 0 outside of the mask.

    Half precision goes through float32, because the interpreter cannot convert it directly.
    """
    value = tl.load(pointer, mask=mask, other=0.0)
    if value.dtype != tl.float64:
        value = value.to(tl.float32)
    return value.to(tl.float64)


@triton.jit
def _store(pointer, value, mask):
    """Store a float64 value in the pointer's dtype; half precision again goes through float32."""
    if pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _packed(i, j, b: tl.constexpr):
    """Offset of entry (i, j), or (j, i) if i > j, in the packed strict upper triangle."""
    low = tl.minimum(i, j)
    high = tl.maximum(i, j)
    return low * (2 * b - low - 1) // 2 + high - low - 1


@triton.jit
def _inverse(a, i, j, B: tl.constexpr):
    """Inverse of a [G, B, B] by in-place Gauss-Jordan elimination.

    There is no pivoting: the symmetric part of a is I, so every pivot is at least 1. Beside entries
    of 1e8 it may be rounded to 0, which makes the inverse NaN (docs/cayley.md).
    """
    for k in range(B):
        row = tl.sum(tl.where(i == k, a, 0.0), axis=1)
        column = tl.sum(tl.where(j == k, a, 0.0), axis=2)
        pivot = tl.sum(tl.where(tl.arange(0, B)[None, :] == k, row, 0.0), axis=1)
        inverse = 1.0 / pivot
        row = (row * inverse[:, None])[:, None, :]
        column = column[:, :, None]
        rest = tl.where(j == k, -column * inverse[:, None, None], a - column * row)
        a = tl.where(i == k, tl.where(j == k, inverse[:, None, None], row), rest)
    return a


@triton.jit
def _product(left, right, i, j, B: tl.constexpr):
    """Product left @ right of [G, B, B] tiles, as a sum of outer products."""
    total = tl.zeros_like(left)
    for k in range(B):
        column = tl.sum(tl.where(j == k, left, 0.0), axis=2)
        row = tl.sum(tl.where(i == k, right, 0.0), axis=1)
        total += column[:, :, None] * row[:, None, :]
    return total


@triton.jit
def _tile(n_blocks, b: tl.constexpr, B: tl.constexpr, G: tl.constexpr):
    """Indices (block, i, j) of a [G, B, B] tile, and the mask of the entries that exist."""
    block = tl.arange(0, G)[:, None, None]
    i = tl.arange(0, B)[None, :, None]
    j = tl.arange(0, B)[None, None, :]
    return block, i, j, (block < n_blocks) & (i < b) & (j < b)


@triton.jit
def cayley_tile(
    skew_ptr, drop_mask_ptr, blocks_ptr, n_blocks, b: tl.constexpr, B: tl.constexpr, G: tl.constexpr
):
    """Cayley transform of up to G blocks, whose tensors begin at the pointers.

    Args:
        skew_ptr: (G, b(b-1)/2) strict upper triangles, row-major; any float dtype.
        drop_mask_ptr: (G,) bool, or None.
        blocks_ptr: (G, b, b) result; any float dtype.
        n_blocks: blocks that exist, at most G.
        b: block size.
        B: b, padded to a power of two.
        G: blocks of the tile.
    """
    block, i, j, inside = _tile(n_blocks, b, B, G)
    packed: tl.constexpr = b * (b - 1) // 2
    upper = _load(skew_ptr + block * packed + _packed(i, j, b), inside & (i != j))
    if drop_mask_ptr is not None:
        dropped = tl.load(drop_mask_ptr + block, mask=block < n_blocks, other=0)
        upper = tl.where(dropped, 0.0, upper)  # Q = 0 gives exactly the identity
    eye = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    inverse = _inverse(tl.where(i < j, eye - upper, eye + upper), i, j, B)
    _store(blocks_ptr + (block * b + i) * b + j, 2.0 * inverse - eye, inside)


@triton.jit
def cayley_backward_tile(
    blocks_ptr,
    drop_mask_ptr,
    grad_ptr,
    skew_grad_ptr,
    n_blocks,
    splits,
    split_stride,
    b: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
):
    """Gradient of ``cayley_tile``.

    The gradient of the blocks comes as ``splits`` partial sums. They are added in a fixed order, so
    that the result is the same in every run.

    Args:
        blocks_ptr: (G, b, b) blocks, as the forward made them; any float dtype.
        drop_mask_ptr: (G,) bool, or None.
        grad_ptr: (G, b, b) first partial gradient of the blocks; any float dtype.
        skew_grad_ptr: (G, b(b-1)/2) result; any float dtype.
        n_blocks: blocks that exist, at most G.
        splits: number of partial gradients.
        split_stride: elements from one partial gradient to the next.
        b: block size.
        B: b, padded to a power of two.
        G: blocks of the tile.
    """
    block, i, j, inside = _tile(n_blocks, b, B, G)
    eye = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    left = eye + _load(blocks_ptr + (block * b + j) * b + i, inside)  # (I + R)^T
    grad = tl.zeros((G, B, B), dtype=tl.float64)
    for _ in range(splits):
        grad += _load(grad_ptr + (block * b + i) * b + j, inside)
        grad_ptr += split_stride
    twice = _product(_product(left, grad, i, j, B), left, i, j, B)
    skew_grad = 0.5 * (twice - tl.permute(twice, (0, 2, 1)))
    if drop_mask_ptr is not None:
        dropped = tl.load(drop_mask_ptr + block, mask=block < n_blocks, other=0)
        skew_grad = tl.where(dropped, 0.0, skew_grad)
    packed: tl.constexpr = b * (b - 1) // 2
    _store(skew_grad_ptr + block * packed + _packed(i, j, b), skew_grad, inside & (i < j))


@triton.jit(do_not_specialize=["n_blocks"])
def cayley_kernel(
    skew_ptr, drop_mask_ptr, blocks_ptr, n_blocks, b: tl.constexpr, B: tl.constexpr, G: tl.constexpr
):
    """Cayley transform of G blocks per program.

    Args:
        skew_ptr: (n_blocks, b(b-1)/2) strict upper triangles, row-major; any float dtype.
        drop_mask_ptr: (n_blocks,) bool, or None.
        blocks_ptr: (n_blocks, b, b) result; dtype of the skew.
        n_blocks: number of blocks.
        b: block size.
        B: b, padded to a power of two.
        G: blocks per program.
    """
    packed: tl.constexpr = b * (b - 1) // 2
    first = tl.program_id(0).to(tl.int64) * G
    cayley_tile(
        skew_ptr + first * packed,
        None if drop_mask_ptr is None else drop_mask_ptr + first,
        blocks_ptr + first * (b * b),
        tl.minimum(n_blocks - first, G).to(tl.int32),
        b,
        B,
        G,
    )


@triton.jit(do_not_specialize=["n_blocks"])
def cayley_backward_kernel(
    blocks_ptr,
    drop_mask_ptr,
    grad_ptr,
    skew_grad_ptr,
    n_blocks,
    b: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
):
    """Gradient of ``cayley_kernel``, G blocks per program.

    Args:
        blocks_ptr: (n_blocks, b, b) blocks, as the forward made them; any float dtype.
        drop_mask_ptr: (n_blocks,) bool, or None.
        grad_ptr: (n_blocks, b, b) gradient of the blocks; dtype of the blocks.
        skew_grad_ptr: (n_blocks, b(b-1)/2) result; dtype of the blocks.
        n_blocks: number of blocks.
        b: block size.
        B: b, padded to a power of two.
        G: blocks per program.
    """
    packed: tl.constexpr = b * (b - 1) // 2
    first = tl.program_id(0).to(tl.int64) * G
    cayley_backward_tile(
        blocks_ptr + first * (b * b),
        None if drop_mask_ptr is None else drop_mask_ptr + first,
        grad_ptr + first * (b * b),
        skew_grad_ptr + first * packed,
        tl.minimum(n_blocks - first, G).to(tl.int32),
        1,
        0,
        b,
        B,
        G,
    )


@cache
def block_size(packed: int) -> int:
    """Block size b, at most 64, of b(b-1)/2 packed numbers."""
    return next(b for b in range(1, MAX_BLOCK_SIZE + 1) if b * (b - 1) // 2 == packed)


def cayley(
    skew: torch.Tensor, drop_mask: torch.Tensor | None, *, tile: MeasuredTile = ()
) -> torch.Tensor:
    """Launch ``cayley_kernel``. The caller checks the arguments.

    Args:
        skew: (..., b(b-1)/2), b <= 64.
        drop_mask: (...) bool, or None.
        tile: measured fields of ``CayleyConfig``.

    Returns:
        Blocks (..., b, b) in the dtype of the skew.
    """
    b = block_size(skew.shape[-1])
    blocks = skew.new_empty(*skew.shape[:-1], b, b)
    launch = _launch_for("cayley", blocks.numel() // (b * b), b, tile)
    launch(skew.contiguous(), _contiguous(drop_mask), blocks)
    return blocks


def cayley_backward(
    blocks: torch.Tensor,
    drop_mask: torch.Tensor | None,
    grad: torch.Tensor,
    *,
    tile: MeasuredTile = (),
) -> torch.Tensor:
    """Launch ``cayley_backward_kernel``. The caller checks the arguments.

    Args:
        blocks: (..., b, b), b <= 64, as the forward made them.
        drop_mask: (...) bool, or None.
        grad: gradient of the blocks.
        tile: measured fields of ``CayleyConfig``.

    Returns:
        Gradient of the skew, (..., b(b-1)/2), in the dtype of the blocks.
    """
    b = blocks.shape[-1]
    skew_grad = blocks.new_empty(*blocks.shape[:-2], b * (b - 1) // 2)
    launch = _launch_for("cayley_backward", blocks.numel() // (b * b), b, tile)
    launch(blocks.contiguous(), _contiguous(drop_mask), grad.contiguous(), skew_grad)
    return skew_grad


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


@lru_cache(LAUNCHES)
def _launch_for(op: str, n_blocks: int, b: int, tile: MeasuredTile) -> Launch:
    kernel = cayley_kernel if op == "cayley" else cayley_backward_kernel
    config = config_for(op, b=b)._replace(**dict(tile))
    constants = {"b": b, "B": config.B, "G": config.G}
    return Launch(kernel, cdiv(n_blocks, config.G), (n_blocks,), constants, config.num_warps)
