"""Triton kernels that compose butterfly factors into dense stages, and their gradient.

A factor joins groups of s features in pairs into groups of 2s. Its work falls into *units*. Unit
u = 2k + h is the half h of block k; it meets only the inner group h of the pair:

    outer[e, t] = sum_q block[e, h r + q] inner[c r + q, t],    e < b, q < r = b/2, t < s,

where c is the chunk of the block, row e lies in chunk c of half e div r of the outer group, and
column t in its half h. So no structural zero is multiplied, and permutations are arithmetic on
offsets. Units are independent: one launch per factor (here), or all in one program that owns whole
groups (stage_from_skew.py). tl.dot is not used: b/2 may be 1, and float32 products are to be exact.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .config import config_for
from .launch import LAUNCHES, Launch, MeasuredTile, cdiv


@triton.jit
def _offsets(unit, first, b: tl.constexpr, s: tl.constexpr):
    """Offsets at which the operands of each unit begin: in factor, inner and outer groups."""
    r: tl.constexpr = b // 2
    chunks: tl.constexpr = s // r
    block = unit // 2
    half = unit % 2
    # block k = (run * chunks + c) * 2^first + l
    above = block >> first
    l = block - (above << first)
    run = above // chunks
    c = above % chunks
    inner = ((((2 * run + half) << first) + l) * s + c * r) * s
    outer = (((run << first) + l) * 2 * s + c * r) * 2 * s + half * s
    return block * b * b + half * r, inner, outer


@triton.jit
def _indices(unit, n_units, b: tl.constexpr, s: tl.constexpr, B: tl.constexpr, T: tl.constexpr):
    """Rows e and columns t of the units' [U, B, T] tile, and a mask of each."""
    e = tl.arange(0, B)[None, :, None]
    t = tl.arange(0, T)[None, None, :]
    exists = (unit < n_units)[:, None, None]
    return e, t, exists & (e < b), exists & (t < s)


@triton.jit
def join(
    factor_ptr,
    inner_ptr,
    outer_ptr,
    unit,
    n_units,
    first,
    b: tl.constexpr,
    s: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
):
    """Compute the part of the outer groups that belongs to some units.

    Args:
        factor_ptr: (n_blocks, b, b) blocks of the factor; float32 or float64.
        inner_ptr: (n_blocks b / s, s, s) inner groups; dtype of the factor.
        outer_ptr: (n_blocks b / 2s, 2s, 2s) result; dtype of the factor.
        unit: [U] numbers of the units.
        n_units: units that exist, 2 n_blocks.
        first: index of the stage's first factor in the butterfly; 2**first groups interleave.
        b: block size.
        s: features of an inner group.
        B: b, padded to a power of two.
        T: s, padded likewise: B (s / b).
    """
    r: tl.constexpr = b // 2
    e, t, rows, columns = _indices(unit, n_units, b, s, B, T)
    block, inner, outer = _offsets(unit[:, None, None], first, b, s)
    left_ptr = factor_ptr + block + e * b
    right_ptr = inner_ptr + inner + t
    total = tl.zeros((unit.shape[0], B, T), dtype=outer_ptr.dtype.element_ty)
    for q in range(r):
        left = tl.load(left_ptr + q, mask=rows, other=0.0)
        right = tl.load(right_ptr + q * s, mask=columns, other=0.0)
        total += left * right
    row = (e // r * s + e % r) * 2 * s
    tl.store(outer_ptr + outer + row + t, total, mask=rows & columns)


@triton.jit
def unjoin(
    factor_ptr,
    inner_ptr,
    grad_ptr,
    factor_grad_ptr,
    inner_grad_ptr,
    unit,
    n_units,
    first,
    splits,
    split_stride,
    b: tl.constexpr,
    s: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
):
    """Gradient of ``join``.

    The gradient of the outer groups comes as ``splits`` partial sums. They are added in a fixed
    order, so that the result is the same in every run.

    Args:
        factor_ptr: (n_blocks, b, b) blocks of the factor; float32 or float64.
        inner_ptr: (n_blocks b / s, s, s) inner groups; dtype of the factor.
        grad_ptr: (n_blocks b / 2s, 2s, 2s) first partial gradient of the outer groups; dtype of
            the factor.
        factor_grad_ptr: gradient of the factor, like it.
        inner_grad_ptr: gradient of the inner groups, like them.
        unit: [U] numbers of the units.
        n_units: units that exist, 2 n_blocks.
        first: as for ``join``.
        splits: number of partial gradients.
        split_stride: elements from one partial gradient to the next.
        b: block size.
        s: features of an inner group.
        B: b, padded to a power of two.
        T: s, padded likewise: B (s / b).
    """
    r: tl.constexpr = b // 2
    e, t, rows, columns = _indices(unit, n_units, b, s, B, T)
    block, inner, outer = _offsets(unit[:, None, None], first, b, s)
    row = (e // r * s + e % r) * 2 * s
    grad = tl.zeros((unit.shape[0], B, T), dtype=factor_ptr.dtype.element_ty)
    partial_ptr = grad_ptr
    for _ in range(splits):
        grad += tl.load(partial_ptr + outer + row + t, mask=rows & columns, other=0.0)
        partial_ptr += split_stride
    left_ptr = factor_ptr + block + e * b
    right_ptr = inner_ptr + inner + t
    for q in range(r):
        left = tl.load(left_ptr + q, mask=rows, other=0.0)
        right = tl.load(right_ptr + q * s, mask=columns, other=0.0)
        left_grad = tl.sum(grad * right, axis=2, keep_dims=True)
        tl.store(factor_grad_ptr + block + e * b + q, left_grad, mask=rows)
        right_grad = tl.sum(grad * left, axis=1, keep_dims=True)
        tl.store(inner_grad_ptr + inner + q * s + t, right_grad, mask=columns)


@triton.jit(do_not_specialize=["n_units", "first"])
def compose_kernel(
    factor_ptr,
    inner_ptr,
    outer_ptr,
    n_units,
    first,
    b: tl.constexpr,
    s: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    U: tl.constexpr,
):
    """Compose one more factor with the product of those before it, U units per program.

    Args:
        factor_ptr: (n_blocks, b, b) blocks of the factor; float32 or float64.
        inner_ptr: (n_blocks b / s, s, s) product so far; dtype of the factor.
        outer_ptr: (n_blocks b / 2s, 2s, 2s) result; dtype of the factor.
        n_units: 2 n_blocks.
        first: as for ``join``.
        b: block size.
        s: features of an inner group.
        B: b, padded to a power of two.
        T: s, padded likewise: B (s / b).
        U: units per program.
    """
    unit = tl.program_id(0).to(tl.int64) * U + tl.arange(0, U)
    join(factor_ptr, inner_ptr, outer_ptr, unit, n_units, first, b, s, B, T)


@triton.jit(do_not_specialize=["n_units", "first", "splits"])
def compose_backward_kernel(
    factor_ptr,
    inner_ptr,
    grad_ptr,
    factor_grad_ptr,
    inner_grad_ptr,
    n_units,
    first,
    splits,
    split_stride,
    b: tl.constexpr,
    s: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    U: tl.constexpr,
):
    """Gradient of ``compose_kernel``, U units per program.

    Args:
        factor_ptr: (n_blocks, b, b) blocks of the factor; float32 or float64.
        inner_ptr: (n_blocks b / s, s, s) product of the factors before it; dtype of the factor.
        grad_ptr: (splits, n_blocks b / 2s, 2s, 2s) partial gradients of the result, which are
            summed; dtype of the factor.
        factor_grad_ptr: gradient of the factor, like it.
        inner_grad_ptr: gradient of the product before it, like that.
        n_units: 2 n_blocks.
        first: as for ``join``.
        splits: number of partial gradients.
        split_stride: elements of one partial gradient.
        b: block size.
        s: features of an inner group.
        B: b, padded to a power of two.
        T: s, padded likewise: B (s / b).
        U: units per program.
    """
    unit = tl.program_id(0).to(tl.int64) * U + tl.arange(0, U)
    unjoin(
        factor_ptr, inner_ptr, grad_ptr, factor_grad_ptr, inner_grad_ptr,
        unit, n_units, first, splits, split_stride, b, s, B, T,
    )  # fmt: skip


def compose(factors: torch.Tensor, first: int, *, tile: MeasuredTile = ()) -> torch.Tensor:
    """Launch ``compose_kernel`` for each factor but the first. The caller checks the arguments.

    Args:
        factors: (n, K, b, b), float32 or float64.
        first: as for ``join``.
        tile: measured fields of ``ComposeConfig``.

    Returns:
        Stage (K b / size, size, size), size = b << (n - 1).
    """
    factors = factors.contiguous()
    return factors[0].clone() if len(factors) == 1 else _products(factors, first, tile)[-1]


def compose_backward(
    factors: torch.Tensor, grad: torch.Tensor, first: int, *, tile: MeasuredTile = ()
) -> torch.Tensor:
    """Launch ``compose_backward_kernel`` for each factor but the first, in reverse order.

    The products of the factors are computed again. The caller checks the arguments.

    Args:
        factors: (n, K, b, b), float32 or float64.
        grad: (splits, K b / size, size, size) partial gradients of the stage, which are summed.
        first: as for ``join``.
        tile: measured fields of ``ComposeConfig``.

    Returns:
        Gradient of the factors, like them.
    """
    if len(factors) == 1:
        return grad.sum(0, keepdim=True)
    factors, grad = factors.contiguous(), grad.contiguous()
    factors_grad = torch.empty_like(factors)
    products = _products(factors[:-1], first, tile)
    for i in range(len(factors) - 1, 0, -1):
        inner = products[i - 1]
        inner_grad = torch.empty_like(inner) if i > 1 else factors_grad[0]
        sizes = *factors.shape[1:3], inner.shape[-1]
        launch = _launch_for(True, *sizes, first, len(grad), grad[0].numel(), tile=tile)
        launch(factors[i], inner, grad, factors_grad[i], inner_grad)
        grad = inner_grad[None]
    return factors_grad


def _products(factors: torch.Tensor, first: int, tile: MeasuredTile) -> list[torch.Tensor]:
    """Products of the first 1, 2, ... factors, each (K b / s, s, s)."""
    products = [factors[0]]
    for factor in factors[1:]:
        n_groups, s, _ = products[-1].shape
        outer = factors.new_empty(n_groups // 2, 2 * s, 2 * s)
        launch = _launch_for(False, *factors.shape[1:3], s, first, tile=tile)
        launch(factor, products[-1], outer)
        products.append(outer)
    return products


@lru_cache(LAUNCHES)
def _launch_for(
    backward: bool, n_blocks: int, b: int, s: int, *scalars: int, tile: MeasuredTile
) -> Launch:
    """Launch that composes one more factor with groups of s features, or its gradient."""
    config = config_for("compose", b=b, s=s)._replace(**dict(tile))
    constants = {"b": b, "s": s, "B": config.B, "T": config.T, "U": config.U}
    kernel = compose_backward_kernel if backward else compose_kernel
    grid, scalars = cdiv(2 * n_blocks, config.U), (2 * n_blocks, *scalars)
    return Launch(kernel, grid, scalars, constants, config.num_warps)
