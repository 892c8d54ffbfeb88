"""Matrix functions that rest on an LU decomposition, safe on a CPU.

oneMKL's LU of a batch of matrices above about 150 rows hangs, or returns wrong numbers, if torch
spreads the batch over threads (pytorch issues 142815 and 141358). Larger matrices are therefore
decomposed one at a time on a CPU, where each of them has enough work for all threads anyway.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# Rows up to which a batch is decomposed in one call: far below the sizes that fail, where a call
# for each of hundreds of matrices would cost more than the decomposition.
MAX_BATCHED = 64


def map_matrices(
    function: Callable[[torch.Tensor], torch.Tensor], matrices: torch.Tensor
) -> torch.Tensor:
    """``function`` of each matrix (..., b, b); one call for all of them where that is safe."""
    one_call = matrices.dim() == 2 or matrices.shape[-1] <= MAX_BATCHED
    if one_call or matrices.device.type != "cpu" or matrices.numel() == 0:
        return function(matrices)
    results = torch.stack([function(matrix) for matrix in matrices.flatten(0, -3)])
    return results.unflatten(0, matrices.shape[:-2])


class _Inverse(torch.autograd.Function):
    """The inverse of each matrix; vmap adds a dimension to the batch instead of batching the LU."""

    @staticmethod
    def forward(matrices):
        # check_errors=False: no wait for a GPU
        return map_matrices(lambda m: torch.linalg.inv_ex(m, check_errors=False).inverse, matrices)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return -inverse.mT @ grad @ inverse.mT

    @staticmethod
    def vmap(info, in_dims, matrices):
        return _Inverse.apply(matrices.movedim(in_dims[0], 0)), 0


def inverse(matrices: torch.Tensor) -> torch.Tensor:
    """The inverse of each matrix (..., b, b), differentiable; none may be singular."""
    return _Inverse.apply(matrices)


def determinant(matrices: torch.Tensor) -> torch.Tensor:
    """The determinant (...) of each matrix (..., b, b)."""
    return map_matrices(torch.linalg.det, matrices)
