"""Merging a rotation into a weight and taking it out again, against dense products."""

import pytest
import torch

from boft_ops import butterfly_matmul, cayley
from boft_ops.ops.merge import merge_weight, rotate_weight, unmerge_weight


def dense(blocks, kaleidoscope):
    """R by its definition: levels R_{j,1} R_{j,2}^T, the last one first."""
    eye = torch.eye(blocks.shape[1] * blocks.shape[2], dtype=torch.float64)
    if not kaleidoscope:
        return butterfly_matmul(eye, blocks)
    matrices = [butterfly_matmul(eye, one) for one in blocks.unflatten(0, (2 * kaleidoscope, -1))]
    product = eye
    for first, second in zip(matrices[::2], matrices[1::2], strict=True):
        product = first @ second.T @ product
    return product


@pytest.mark.parametrize("kaleidoscope", [0, 2])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("method", ["exact", "neumann5"])
@pytest.mark.parametrize("shape", [(16, 16), (16, 4, 2, 2)])
def test_merging_and_back(shape, method, side, kaleidoscope):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    scale = torch.rand(16, dtype=torch.float64) + 0.5
    m = 2 * (2 * kaleidoscope or 1)
    blocks = cayley(torch.randn(m, 4, 6, dtype=torch.float64) * 0.1, method=method)
    r, matrix = dense(blocks, kaleidoscope), weight.flatten(1)
    expected = scale[:, None] * (matrix @ r.T if side == "in" else r @ matrix)
    options = {"side": side, "kaleidoscope": kaleidoscope}
    merged = merge_weight(weight, blocks, scale, **options)
    torch.testing.assert_close(merged, expected.reshape(shape))
    torch.testing.assert_close(rotate_weight(matrix, blocks, scale, **options), expected)
    back = unmerge_weight(merged, blocks, scale, orthogonal=method == "exact", **options)
    torch.testing.assert_close(back, weight)
    assert back.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    torch.manual_seed(0)
    weight, blocks = torch.randn(16, 16).to(dtype), cayley(torch.randn(2, 4, 6))
    merged = merge_weight(weight, blocks)
    assert merged.dtype == dtype
    assert torch.equal(merged, merge_weight(weight.float(), blocks).to(dtype))


def test_no_division_by_zero():
    scale = torch.ones(16)
    scale[3] = 0
    with pytest.raises(ValueError, match="scale: expected no zero in order to unmerge"):
        unmerge_weight(torch.randn(16, 16), cayley(torch.zeros(2, 4, 6)), scale)
