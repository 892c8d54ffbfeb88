"""Triton kernels of the Cayley transform and its gradient.

One program holds G blocks of B x B in registers, B the next power of two of the block size b; the
padding is the identity and never mixes with the rest. Arithmetic is in float64: a float32
elimination would need a residual step and still be off by |Q| times as much. No tl.dot, whose least
sizes would rule out b < 16.

Where drop_ptr is not None (a constant of the compiled kernel), it masks blocks by multiplicative
dropout: a dropped block is the identity and has no gradient.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from .config import MAX_BLOCK_SIZE, config_for, tuned
from .launch import Launch, cdiv, remembered


@triton.jit
def _load(pointer, mask):
    """In float64; a half goes through float32, as the interpreter has no direct conversion."""
    value = tl.load(pointer, mask=mask, other=0.0)
    if value.dtype != tl.float64:
        value = value.to(tl.float32)
    return value.to(tl.float64)


@triton.jit
def _store(pointer, value, mask):
    if pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _packed(i, j, b: tl.constexpr):
    """Offset of entry (i, j) or (j, i) in the packed strict upper triangle, row-major."""
    low = tl.minimum(i, j)
    high = tl.maximum(i, j)
    return low * (2 * b - low - 1) // 2 + high - low - 1


@triton.jit
def _inverse(a, i, j, B: tl.constexpr):
    """In-place Gauss-Jordan of a[G, B, B], unpivoted: the symmetric part of a is I, pivots >= 1."""
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
    """left @ right of [G, B, B] tiles as a sum of outer products."""
    total = tl.zeros_like(left)
    for k in range(B):
        column = tl.sum(tl.where(j == k, left, 0.0), axis=2)
        row = tl.sum(tl.where(i == k, right, 0.0), axis=1)
        total += column[:, :, None] * row[:, None, :]
    return total


@triton.jit
def _tile(n_blocks, b: tl.constexpr, B: tl.constexpr, G: tl.constexpr):
    """Block, row and column of the elements of a [G, B, B] tile, and which of them exist."""
    block = tl.arange(0, G)[:, None, None]
    i = tl.arange(0, B)[None, :, None]
    j = tl.arange(0, B)[None, None, :]
    return block, i, j, (block < n_blocks) & (i < b) & (j < b)


@triton.jit
def cayley_tile(
    skew_ptr, drop_ptr, blocks_ptr, n_blocks, b: tl.constexpr, B: tl.constexpr, G: tl.constexpr
):
    """The first n_blocks <= G blocks at these pointers."""
    block, i, j, inside = _tile(n_blocks, b, B, G)
    packed: tl.constexpr = b * (b - 1) // 2
    upper = _load(skew_ptr + block * packed + _packed(i, j, b), inside & (i != j))
    if drop_ptr is not None:
        dropped = tl.load(drop_ptr + block, mask=block < n_blocks, other=0)
        upper = tl.where(dropped, 0.0, upper)  # Q = 0 gives the identity, exactly
    eye = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    inverse = _inverse(tl.where(i < j, eye - upper, eye + upper), i, j, B)
    _store(blocks_ptr + (block * b + i) * b + j, 2.0 * inverse - eye, inside)


@triton.jit
def cayley_backward_tile(
    blocks_ptr,
    drop_ptr,
    grad_ptr,
    skew_grad_ptr,
    n_blocks,
    splits,
    split_stride,
    b: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
):
    """Gradient of ``cayley_tile``: that of the blocks is the sum of ``splits`` partial ones.

    They are added in their order as they are loaded, so that the sum is the same in every run.
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
    if drop_ptr is not None:
        dropped = tl.load(drop_ptr + block, mask=block < n_blocks, other=0)
        skew_grad = tl.where(dropped, 0.0, skew_grad)
    packed: tl.constexpr = b * (b - 1) // 2
    _store(skew_grad_ptr + block * packed + _packed(i, j, b), skew_grad, inside & (i < j))


@triton.jit(do_not_specialize=["n_blocks"])
def cayley_kernel(
    skew_ptr, drop_ptr, blocks_ptr, n_blocks, b: tl.constexpr, B: tl.constexpr, G: tl.constexpr
):
    packed: tl.constexpr = b * (b - 1) // 2
    first = tl.program_id(0).to(tl.int64) * G
    cayley_tile(
        skew_ptr + first * packed,
        None if drop_ptr is None else drop_ptr + first,
        blocks_ptr + first * (b * b),
        tl.minimum(n_blocks - first, G).to(tl.int32),
        b,
        B,
        G,
    )


@triton.jit(do_not_specialize=["n_blocks"])
def cayley_backward_kernel(
    blocks_ptr,
    drop_ptr,
    grad_ptr,
    skew_grad_ptr,
    n_blocks,
    b: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
):
    packed: tl.constexpr = b * (b - 1) // 2
    first = tl.program_id(0).to(tl.int64) * G
    cayley_backward_tile(
        blocks_ptr + first * (b * b),
        None if drop_ptr is None else drop_ptr + first,
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
    """b of b(b-1)/2 packed numbers, b <= 64."""
    return next(b for b in range(1, MAX_BLOCK_SIZE + 1) if b * (b - 1) // 2 == packed)


def cayley(skew: torch.Tensor, drop: torch.Tensor | None) -> torch.Tensor:
    """(..., b(b-1)/2) and mask (...) or None -> (..., b, b), b <= 64; checked by the caller."""
    b = block_size(skew.shape[-1])
    blocks = skew.new_empty(*skew.shape[:-1], b, b)
    n_blocks = blocks.numel() // (b * b)
    launch = _launch_of("cayley", skew.get_device(), skew.dtype, n_blocks, b)
    launch(skew.contiguous(), _mask(drop), blocks)
    return blocks


def cayley_backward(
    blocks: torch.Tensor, drop: torch.Tensor | None, grad: torch.Tensor
) -> torch.Tensor:
    """(..., b, b), mask, the gradient of it -> (..., b(b-1)/2), b <= 64; checked by the caller."""
    b = blocks.shape[-1]
    skew_grad = blocks.new_empty(*blocks.shape[:-2], b * (b - 1) // 2)
    n_blocks = blocks.numel() // (b * b)
    launch = _launch_of("cayley_backward", blocks.get_device(), blocks.dtype, n_blocks, b)
    launch(blocks.contiguous(), _mask(drop), grad.contiguous(), skew_grad)
    return skew_grad


def _mask(drop: torch.Tensor | None) -> torch.Tensor | None:
    return None if drop is None else drop.contiguous()


@remembered
def _launch_of(op: str, device: int, dtype: torch.dtype, n_blocks: int, b: int) -> Launch:
    kernel = cayley_kernel if op == "cayley" else cayley_backward_kernel
    config = tuned(config_for(op, b=b), op, device, dtype, (b,), (n_blocks,))
    constants = {"b": b, "B": config.B, "G": config.G}
    return Launch(kernel, cdiv(n_blocks, config.G), (n_blocks,), constants, config.num_warps)
