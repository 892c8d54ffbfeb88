"""The scale of the outputs and its gradients, on every backend."""

import pytest
import torch

from boft_ops._runtime import backend as backends
from boft_ops.ops.scale import (
    scale_backward,
    scale_backward_reference,
    scale_columns,
    scale_forward,
    scale_reference,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def inputs(rows, n, dtype):
    exact = torch.promote_types(dtype, torch.float32)
    x, grad = torch.randn(2, rows, n, dtype=exact).to(dtype)
    return x, grad, *torch.randn(2, n, dtype=exact), torch.randn(n).to(dtype)


def skip_if_not_taken(backend, dtype):
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the C++ kernels leave float16 to torch")


def assert_as_good(got, reference, truth):
    """At most twice the error of the same computation in torch, and a few roundings."""
    assert (got.dtype, got.shape) == (reference.dtype, reference.shape)
    if got.numel():
        error, allowed = ((t.double() - truth).abs().max().item() for t in (got, reference))
        ulp = torch.finfo(got.dtype).eps * max(1.0, truth.abs().max().item())
        bound = (32 if got.dtype == torch.float64 else 2) * ulp  # float64 is its own truth
        assert error <= 2 * allowed + bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n"), [(0, 8), (1, 1), (70, 37), (9, 1040), (5, 0)])
def test_forward(backend, rows, n, dtype):
    skip_if_not_taken(backend, dtype)
    x, _, scale, center, bias = inputs(rows, n, dtype)
    for vectors in [(None, None), (bias, bias), (center, bias), (None, bias)]:
        with torch.no_grad():
            y = scale_forward(x, scale, *vectors)
        wide = [None if v is None else v.double() for v in vectors]
        assert_as_good(
            y,
            scale_reference(x, scale, *vectors),
            scale_reference(x.double(), scale.double(), *wide),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_of_one_changes_no_bit(backend, dtype):
    skip_if_not_taken(backend, dtype)
    x, _, scale, _, bias = inputs(33, 130, dtype)
    with torch.no_grad():
        assert torch.equal(scale_forward(x, torch.ones_like(scale), bias, bias), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n"), [(0, 8), (1, 1), (70, 37), (33, 1040), (5, 0)])
@pytest.mark.parametrize("centered", [False, True])
def test_backward(backend, centered, rows, n, dtype):
    skip_if_not_taken(backend, dtype)
    x, grad, scale, center, _ = inputs(rows, n, dtype)
    center = center if centered else None
    with torch.no_grad():
        got = scale_backward(grad, x, scale, center)
    exact = [None if t is None else t.double() for t in (grad, x, scale, center)]
    wanted = scale_backward_reference(grad, x, scale, center), scale_backward_reference(*exact)
    for one, reference, truth in zip(got, *wanted, strict=True):
        assert_as_good(one, reference, truth)
    with torch.no_grad():
        none, *sums = scale_backward(grad, x, None, center)
    assert none.shape == (0, n)
    for one, reference, truth in zip(sums, *(w[1:] for w in wanted), strict=True):
        assert_as_good(one, reference, truth)


def test_gradients(backend):
    x, _, scale, center, bias = inputs(5, 6, torch.float64)
    tensors = [t.requires_grad_() for t in (x, scale, center, bias)]
    assert torch.autograd.gradcheck(scale_columns, tensors)
    assert torch.autograd.gradcheck(scale_columns, tensors[:2])
    assert torch.autograd.gradgradcheck(scale_columns, tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (70, 37), (300, 4096)])
def test_on_a_gpu(name, rows, n, dtype):
    if name in backends.ops()["scale"].unavailable:
        pytest.skip(backends.ops()["scale"].unavailable[name])
    x, grad, scale, center, bias = inputs(rows, n, dtype)
    moved = [t.cuda() for t in (x, grad, scale, center, bias)]
    with backends.force(name), torch.no_grad():
        y = scale_forward(moved[0], moved[2], moved[3], moved[4]).cpu()
        got = [t.cpu() for t in scale_backward(moved[1], *moved[:1], *moved[2:4])]
    exact = [t.double() for t in (x, grad, scale, center, bias)]
    assert_as_good(
        y, scale_reference(x, scale, center, bias), scale_reference(exact[0], *exact[2:])
    )
    wanted = (
        scale_backward_reference(grad, x, scale, center),
        scale_backward_reference(exact[1], exact[0], *exact[2:4]),
    )
    for one, reference, truth in zip(got, *wanted, strict=True):
        assert_as_good(one, reference, truth)
