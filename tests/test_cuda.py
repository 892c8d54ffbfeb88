"""The CUDA kernels, emulated on the CPU: through their bindings, against the ops' references.

Truth is the reference in float64. Each structure runs in one order of threads, all three in turn;
tests/test_cuda_broken.py shows that a kernel without one of its barriers fails.
"""

import itertools
import os
import shutil
import sys
from pathlib import Path

import cuda_emulation
import pytest
import torch

from boft_ops import _backend, _build, _paths
from boft_ops.cayley import _exact, _exact_backward

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="emulated with GCC on Linux"
)
ORDERS = ("forward", "reverse", "scattered")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ATOL = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-6, torch.float16: 1e-6}


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    """The operators; a library built beforehand is that of BOFT_EMULATED_LIBRARY."""
    built = os.environ.get("BOFT_EMULATED_LIBRARY")
    if built is None:
        built = cuda_emulation.build(_paths.csrc(), tmp_path_factory.mktemp("emulated"))
    return cuda_emulation.register(Path(built), "boft_emulated")


@pytest.fixture(autouse=True)
def order(monkeypatch, _orders=itertools.cycle(ORDERS)):  # noqa: B008  one cycle for all the tests
    monkeypatch.setenv("BOFT_EMULATION_ORDER", next(_orders))


def check(got, reference, truth, scale=0.0):
    """At most twice the error of the same computation in torch, and a few roundings of float32."""
    assert got.dtype == reference.dtype
    assert got.shape == reference.shape
    assert got.isfinite().all()
    if got.numel():
        error, allowed = ((t.double() - truth).abs().max().item() for t in (got, reference))
        assert error <= 2 * allowed + ATOL[got.dtype] * max(scale, truth.abs().max().item())


def dropout(kind, *shape):
    return None if kind == "none" else torch.rand(shape) < {"some": 0.4, "all": 1.0}[kind]


@pytest.mark.parametrize("drop", ["none", "some", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [1, 2, 3, 4, 6, 8, 13, 16, 27, 32, 50, 64])
def test_cayley(cuda, b, dtype, drop):
    shape = (2, 17) if b <= 16 else (1, 3)  # the last team of a block of threads has no work
    mask = dropout(drop, *shape)
    skew = (torch.randn(*shape, b * (b - 1) // 2) / b**0.5).to(dtype)
    blocks = cuda.cayley(skew, mask)
    check(blocks, _exact(skew, mask), _exact(skew.double(), mask))
    grad = torch.randn(*shape, b, b).to(dtype)
    skew_grad = cuda.cayley_backward(blocks, mask, grad)
    truth = _exact_backward(blocks.double(), mask, grad.double())
    check(skew_grad, _exact_backward(blocks, mask, grad), truth, scale=1.0)
    if mask is not None:
        assert torch.equal(blocks[mask], torch.eye(b, dtype=dtype).expand_as(blocks[mask]))
        assert not skew_grad[mask].any()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e2, 1e6])
def test_cayley_of_any_size_of_angle(cuda, scale):
    skew = torch.randn(40, 28) * scale
    check(cuda.cayley(skew, None), _exact(skew), _exact(skew.double()))


def test_cayley_of_nothing_and_of_strided_operands(cuda):
    assert cuda.cayley(torch.randn(0, 28), None).shape == (0, 8, 8)
    assert cuda.cayley_backward(torch.randn(0, 8, 8), None, torch.randn(0, 8, 8)).shape == (0, 28)
    skew, drop = torch.randn(2, 28, 9).mT, dropout("some", 9, 2).T
    blocks = cuda.cayley(skew, drop)
    assert torch.equal(blocks, cuda.cayley(skew.contiguous(), drop.contiguous()))
    grad = torch.randn_like(blocks).mT
    got = cuda.cayley_backward(blocks, drop, grad)
    assert torch.equal(got, cuda.cayley_backward(blocks, drop, grad.contiguous()))
