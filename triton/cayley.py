"""Triton kernels of the Cayley transform and its gradient.

One program holds G blocks of B x B in registers, B the next power of two of the block size b; the
padding is the identity and never mixes with the rest. Arithmetic is in float64: a float32
elimination would need a residual step and still be off by |Q| times as much. No tl.dot, whose least
sizes would rule out b < 16.
"""

import torch
import triton
import triton.language as tl

MAX_BLOCK_SIZE = 64


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
        pivot = tl.sum(tl.sum(tl.where((i == k) & (j == k), a, 0.0), axis=2), axis=1)
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
def cayley_kernel(
    skew_ptr, blocks_ptr, n_blocks, b: tl.constexpr, B: tl.constexpr, G: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)[:, None, None]
    i = tl.arange(0, B)[None, :, None]
    j = tl.arange(0, B)[None, None, :]
    inside = (block < n_blocks) & (i < b) & (j < b)
    packed: tl.constexpr = b * (b - 1) // 2
    upper = _load(skew_ptr + block * packed + _packed(i, j, b), inside & (i != j))
    eye = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    inverse = _inverse(tl.where(i < j, eye - upper, eye + upper), i, j, B)
    _store(blocks_ptr + (block * b + i) * b + j, 2.0 * inverse - eye, inside)


@triton.jit
def cayley_backward_kernel(
    blocks_ptr, grad_ptr, skew_grad_ptr, n_blocks, b: tl.constexpr, B: tl.constexpr, G: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)[:, None, None]
    i = tl.arange(0, B)[None, :, None]
    j = tl.arange(0, B)[None, None, :]
    inside = (block < n_blocks) & (i < b) & (j < b)
    base = block * b * b
    eye = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    left = eye + _load(blocks_ptr + base + j * b + i, inside)  # (I + R)^T
    grad = _load(grad_ptr + base + i * b + j, inside)
    twice = _product(_product(left, grad, i, j, B), left, i, j, B)
    skew_grad = 0.5 * (twice - tl.permute(twice, (0, 2, 1)))
    packed: tl.constexpr = b * (b - 1) // 2
    _store(skew_grad_ptr + block * packed + _packed(i, j, b), skew_grad, inside & (i < j))


def config(block_size: int) -> dict[str, int]:
    """Tile of both kernels: B, the blocks per program G, and num_warps.

    Up to B = 16 one warp, whose reductions are shuffles; above, the tile is spread over more warps
    so that float64 stays in registers.
    """
    B = max(2, triton.next_power_of_2(block_size))
    return {"B": B, "G": max(1, 16 // B), "num_warps": {16: 2, 32: 4, 64: 8}.get(B, 1)}


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """(..., b(b-1)/2) -> (..., b, b), b <= 64; checked by the caller."""
    skew = skew.contiguous()
    packed = skew.shape[-1]
    b = next(b for b in range(1, MAX_BLOCK_SIZE + 1) if b * (b - 1) // 2 == packed)
    blocks = skew.new_empty(*skew.shape[:-1], b, b)
    _launch(cayley_kernel, (skew, blocks), blocks.numel() // (b * b), b)
    return blocks


def cayley_backward(blocks: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """(..., b, b) and the gradient of it -> (..., b(b-1)/2), b <= 64; checked by the caller."""
    b = blocks.shape[-1]
    skew_grad = blocks.new_empty(*blocks.shape[:-2], b * (b - 1) // 2)
    tensors = blocks.contiguous(), grad.contiguous(), skew_grad
    _launch(cayley_backward_kernel, tensors, blocks.numel() // (b * b), b)
    return skew_grad


def _launch(kernel, tensors: tuple[torch.Tensor, ...], n_blocks: int, b: int) -> None:
    if n_blocks == 0:
        return
    tile = config(b)
    with torch.cuda.device_of(tensors[0]):  # does nothing for CPU tensors, under the interpreter
        kernel[(triton.cdiv(n_blocks, tile["G"]),)](*tensors, n_blocks, b=b, **tile)
