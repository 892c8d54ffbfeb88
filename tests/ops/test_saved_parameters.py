"""Gradients are those of the forward that ran, whatever is put into .data of a Parameter since."""

import pytest
import torch
from torch import nn

from boft_ops import boft_linear, butterfly_matmul, cayley, kaleidoscope_matmul
from boft_ops.ops.linear import rotated_linear
from boft_ops.ops.rotation import DenseRotation
from boft_ops.ops.scale import scale_columns

D = 32


def parameters(rows, **options):
    return {
        "x": torch.randn(rows, D, requires_grad=True),
        "weight": nn.Parameter(torch.randn(D, D), requires_grad=options.get("trained", False)),
        "skew": nn.Parameter(0.2 * torch.randn(2, 4, 28)),
        "scale": nn.Parameter(1 + 0.1 * torch.randn(D)),
        "bias": nn.Parameter(torch.randn(D)),
    }


def check(function, tensors):
    """Gradients before and after the data of every Parameter was replaced."""
    out = function(**tensors)
    upstream, wanted = torch.randn_like(out), [t for t in tensors.values() if t.requires_grad]
    want = torch.autograd.grad(out, wanted, upstream, retain_graph=True, allow_unused=True)
    for tensor in tensors.values():
        if isinstance(tensor, nn.Parameter):
            tensor.data = torch.randn_like(tensor)
    got = torch.autograd.grad(out, wanted, upstream, allow_unused=True)
    for ours, before in zip(got, want, strict=True):
        torch.testing.assert_close(ours, before, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["exact", "neumann5"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("rows", [8, 128])
def test_boft_linear(rows, side, trained, method):
    check(lambda **t: boft_linear(**t, side=side, method=method), parameters(rows, trained=trained))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_boft_linear_in_other_dtypes(dtype):
    tensors = parameters(8)
    for name in ("x", "weight", "bias"):
        tensors[name].data = tensors[name].data.to(dtype)
    check(boft_linear, tensors)


@pytest.mark.parametrize("rows", [8, 128])
def test_a_layer_with_a_matrix(rows):
    matrix = nn.Parameter(torch.eye(8).repeat(4, 1, 1) + 0.1 * torch.randn(4, 8, 8))
    tensors = {k: v for k, v in parameters(rows).items() if k != "skew"} | {"matrix": matrix}

    def function(x, weight, scale, bias, matrix):
        rotation = DenseRotation(matrix, orthogonal=False)
        return rotated_linear(x, weight, rotation, scale=scale, bias=bias)

    check(function, tensors)


@pytest.mark.parametrize("method", ["exact", "neumann5"])
def test_cayley(method):
    check(lambda skew: cayley(skew, method=method), {"skew": nn.Parameter(torch.randn(3, 28))})


@pytest.mark.parametrize("m", [1, 3])
def test_butterfly_matmul(m):
    blocks = nn.Parameter(torch.randn(m, 4, 8, 8))
    check(butterfly_matmul, {"x": torch.randn(5, D, requires_grad=True), "blocks": blocks})
    check(butterfly_matmul, {"x": nn.Parameter(torch.randn(5, D)), "blocks": blocks})


def test_kaleidoscope_matmul():
    first, second = (nn.Parameter(torch.randn(2, 2, 4, 8, 8)) for _ in range(2))
    x = torch.randn(5, D, requires_grad=True)
    check(kaleidoscope_matmul, {"x": x, "first": first, "second": second})


def test_scale_columns():
    vectors = {name: nn.Parameter(torch.randn(D)) for name in ("scale", "center", "bias")}
    check(scale_columns, {"x": torch.randn(5, D, requires_grad=True)} | vectors)
