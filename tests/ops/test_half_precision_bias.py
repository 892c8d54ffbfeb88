"""A bias in half precision comes last: no rounding beside it reaches anything else."""

import pytest
import torch
import torch.nn.functional as F

from boft_ops import boft_linear, butterfly_matmul, cayley
from boft_ops.ops.linear import rotated_linear
from boft_ops.ops.rotation import DenseRotation, SkewRotation

HALVES = [torch.bfloat16, torch.float16]
N = 64
BIASED = torch.arange(N) % 16 == 0  # the columns with a bias


def operands(dtype, bias_size, rows=1024, std=0.1):
    x, weight = torch.randn(rows, N).to(dtype), (torch.randn(N, N) / 8).to(dtype)
    skew, scale = torch.randn(2, 8, 28) * std, 1 + 0.05 * torch.randn(N)
    return x, weight, skew, scale, (BIASED * bias_size).to(dtype)


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


# a frozen rotation leaves out what the others compute as well
@pytest.mark.exhaustive_if(condition=lambda frozen, bias_size, **_: frozen and bias_size != 400.0)
@pytest.mark.parametrize("bias_size", [0.0, 30.0, 400.0])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("frozen", [True, False])
def test_the_gradient_of_the_scale(backend, frozen, dtype, bias_size):
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the C++ kernels leave float16 to torch")
    x, weight, skew, scale, bias = operands(dtype, bias_size, rows=256)
    weight.requires_grad_(not frozen)
    scale.requires_grad_()
    upstream = torch.randn(len(x), N).to(dtype)
    (got,) = torch.autograd.grad(boft_linear(x, weight, skew, scale, bias), scale, upstream)
    z = F.linear(butterfly_matmul(x, cayley(skew)), weight.detach())
    plain = (upstream.float() * z.float()).sum(0)
    rotated = butterfly_matmul(x.double(), cayley(skew.double()))
    exact = (upstream.double() * F.linear(rotated, weight.detach().double())).sum(0)
    assert error(got, exact) <= 2 * error(plain, exact) + 1e-6


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_rotation_of_outputs_does_not_spread_the_rounding_beside_a_bias(dtype, scaled):
    x, weight, skew, scale, bias = operands(dtype, 400.0)
    scale = scale if scaled else None
    exact = F.linear(x.double(), weight.double())
    exact = butterfly_matmul(exact, cayley(skew.double()), transpose=True)
    exact = exact * (1 if scale is None else scale.double())
    y = boft_linear(x, weight, skew, scale, bias, side="out")
    without = boft_linear(x, weight, skew, scale, side="out")
    columns = ~BIASED
    assert error(y[:, columns], exact[:, columns]) <= 1.1 * error(
        without[:, columns], exact[:, columns]
    )


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_identity_beside_a_large_bias(dtype, side, frozen):
    """The output is torch's bit for bit, and gradients are as good as those of other rotations."""
    x, weight, skew, _, bias = operands(dtype, 100.0, std=0.0)
    weight.requires_grad_(not frozen)
    scale = torch.ones(N, requires_grad=True)
    skew.requires_grad_(), x.requires_grad_(), bias.requires_grad_()
    y = boft_linear(x, weight, skew, scale, bias, side=side)
    assert torch.equal(y, F.linear(x, weight, bias))
    upstream = torch.randn_like(y)
    inputs = [x, skew, scale, bias]
    got = torch.autograd.grad(y, inputs, upstream)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = boft_linear(wide[0], weight.double(), wide[1], wide[2], wide[3], side=side)
    want = torch.autograd.grad(exact, wide, upstream.double())
    for ours, truth in zip(got, want, strict=True):
        assert error(ours, truth) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALVES)
def test_the_identity_without_gradients_and_as_a_matrix(dtype):
    x, weight, skew, _, bias = operands(dtype, 1.0, std=0.0)
    scale, expected = torch.ones(N), F.linear(x, weight, bias)
    eye = torch.eye(16).expand(4, 16, 16).contiguous()
    for rotation in (SkewRotation(skew), DenseRotation(eye)):
        assert torch.equal(rotated_linear(x, weight, rotation, scale=scale, bias=bias), expected)


def test_no_second_product_away_from_the_identity():
    x, weight, skew, scale, bias = operands(torch.bfloat16, 1.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        boft_linear(x, weight, skew, scale.requires_grad_(), bias)
    assert sum(event.name == "aten::linear" for event in profile.events()) == 1
