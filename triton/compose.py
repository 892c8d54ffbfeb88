"""Triton kernels that compose butterfly factors into dense stages, and their gradient.

A factor joins groups of s features in pairs into groups of 2s. Its work falls into *units*: unit
u = 2k + h is the half h of block k, which meets the inner group h of the pair only:

    outer[e, t] = sum_q block[e, h r + q] inner[c r + q, t],    e < b, q < r = b/2, t < s,

where c is the chunk of the block, row e lies in chunk c of half e div r of the outer group, and
column t in its half h. So no structural zero is multiplied, and permutations are arithmetic on
offsets. Units are independent: one launch per factor, or all of them in one program that owns
whole groups (rotation.py). No tl.dot: b/2 may be 1, and float32 stays float32.
"""

import torch
import triton
import triton.language as tl

from .config import config_for
from .launch import Launch, cdiv, remembered


@triton.jit
def _offsets(unit, first, b: tl.constexpr, s: tl.constexpr):
    """Where the operands of each unit begin: in the factor, the inner and the outer groups."""
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
    """Rows e and columns t of the units' [U, B, T] tile, and which of them exist."""
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
    """The outer groups' part that belongs to these units, unit being [U]."""
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
    """Gradient of ``join``: that of the outer groups is the sum of ``splits`` partial ones.

    They are added in their order as they are loaded, so that the sum is the same in every run.
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
    unit = tl.program_id(0).to(tl.int64) * U + tl.arange(0, U)
    unjoin(
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
        b,
        s,
        B,
        T,
    )


def compose(factors: torch.Tensor, first: int) -> torch.Tensor:
    """(n, K, b, b) -> (K b / size, size, size), size = b << (n - 1); checked by the caller."""
    factors = factors.contiguous()
    return factors[0].clone() if len(factors) == 1 else _partial(factors, first)[-1]


def compose_backward(factors: torch.Tensor, grad: torch.Tensor, first: int) -> torch.Tensor:
    """Factors and (splits, K b / size, size, size) -> (n, K, b, b); checked by the caller.

    The gradient of the stage is the sum of ``grad`` over its first dimension.
    """
    if len(factors) == 1:
        return grad.sum(0, keepdim=True)
    factors, grad = factors.contiguous(), grad.contiguous()
    factors_grad = torch.empty_like(factors)
    groups = _partial(factors[:-1], first)
    for i in range(len(factors) - 1, 0, -1):
        inner = groups[i - 1]
        inner_grad = torch.empty_like(inner) if i > 1 else factors_grad[0]
        sizes = *factors.shape[1:3], inner.shape[-1]
        launch = _launch_of(True, *sizes, first, len(grad), grad[0].numel())
        launch(factors[i], inner, grad, factors_grad[i], inner_grad)
        grad = inner_grad[None]
    return factors_grad


def _partial(factors: torch.Tensor, first: int) -> list[torch.Tensor]:
    """The product of the first 1, 2, ... factors, each (K b / s, s, s)."""
    groups = [factors[0]]
    for factor in factors[1:]:
        n_groups, s, _ = groups[-1].shape
        outer = factors.new_empty(n_groups // 2, 2 * s, 2 * s)
        _launch_of(False, *factors.shape[1:3], s, first)(factor, groups[-1], outer)
        groups.append(outer)
    return groups


@remembered
def _launch_of(backward: bool, n_blocks: int, b: int, s: int, *scalars: int) -> Launch:
    """One more factor to groups of s features, or its gradient."""
    config = config_for("compose", b=b, s=s)
    constants = {"b": b, "s": s, "B": config.B, "T": config.T, "U": config.U}
    kernel = compose_backward_kernel if backward else compose_kernel
    grid, scalars = cdiv(2 * n_blocks, config.U), (2 * n_blocks, *scalars)
    return Launch(kernel, grid, scalars, constants, config.num_warps)
