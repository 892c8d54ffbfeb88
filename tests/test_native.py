"""The C++ kernels against the plain-torch references of the same ops, and against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boft_ops import _backend, _native
from boft_ops._namespace import NS

pytestmark = pytest.mark.skipif(
    "rotate" not in _native.kernels("cpu"), reason="no native library (test_backend says why)"
)
raw = getattr(torch.ops, NS)
DTYPES = [torch.float32, torch.float64]
# (n factors, block_size, first): neighbours and strides, sizes below, at and above a vector's
STAGES = [(1, 2, 0), (2, 2, 0), (1, 6, 1), (2, 8, 0), (2, 6, 2), (3, 4, 1), (4, 4, 0), (3, 16, 0)]


def agree(name, *arguments):
    got = getattr(raw, name)(*arguments)
    want = _backend._ops[name].reference(*arguments)
    eps = torch.finfo(arguments[0].dtype).eps
    for g, w in zip(_tuple(got), _tuple(want), strict=True):
        assert g.dtype == w.dtype
        assert g.shape == w.shape
        torch.testing.assert_close(g, w, rtol=64 * eps, atol=64 * eps * w.abs().amax().item()
                                   if w.numel() else 0)  # fmt: skip


def stage_of(n, b, first, dtype, runs=2):
    n_blocks = runs << (n - 1 + first)
    factors = torch.randn(n, n_blocks, b, b, dtype=dtype)
    return factors, _backend._ops["compose"].reference(factors, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "b", "first"), STAGES)
def test_compose(n, b, first, dtype):
    factors, stage = stage_of(n, b, first, dtype)
    agree("compose", factors, first)
    agree("compose_backward", factors, torch.randn_like(stage), first)
    agree("compose_backward", factors.mT, stage.mT, first)  # strides


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 17, 67])
@pytest.mark.parametrize(("n", "b", "first"), STAGES)
def test_rotate_and_gram(n, b, first, rows, dtype):
    factors, stage = stage_of(n, b, first, dtype)
    d = factors.shape[1] * b
    x, g = torch.randn(rows, d, dtype=dtype), torch.randn(d, rows, dtype=dtype).T
    for transpose in (False, True):
        agree("rotate", x, stage, b // 2, 1 << first, transpose)
    agree("rotate", g, stage.mT, b // 2, 1 << first, False)
    agree("gram", x, g, stage.shape[-1], b // 2, 1 << first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 5, 7, 12, 20, 100])
def test_one_factor_of_any_size(size, dtype):
    """OFT: sizes that no vector divides."""
    x, g = torch.randn(9, 2 * size, dtype=dtype), torch.randn(9, 2 * size, dtype=dtype)
    agree("rotate", x, torch.randn(2, size, size, dtype=dtype), size, 1, False)
    agree("gram", x, g, size, size, 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(1, 1100), st.integers(0, 3), st.integers(0, 2**31))
def test_scale_backward(rows, n, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randn(2 * rows * n + 2 * n + offset, generator=generator)[offset:]  # unaligned
    grad, x = memory[: rows * n].view(rows, n), memory[rows * n : 2 * rows * n].view(rows, n)
    scale, center = memory[-n:], memory[-2 * n : -n]
    x_grad, scale_grad, bias_grad = raw.scale_backward(grad, x, scale, center)
    assert torch.equal(x_grad, grad * scale)
    # a sum may cancel: its error is measured by the size of what is summed
    for got, terms in ((scale_grad, grad.double() * (x.double() - center)), (bias_grad, grad)):
        bound = 16 * torch.finfo(torch.float32).eps * terms.double().abs().sum(0)
        assert ((got - terms.double().sum(0)).abs() <= bound).all()


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("rows", [2_000, 60_000])
def test_sums_over_many_rows_keep_their_precision(rows, mean):
    """At most twice the error of torch's own float32 sums and products, against float64."""
    x, grad = torch.randn(rows, 32) + mean, torch.randn(rows, 32) + mean
    scale, center = torch.randn(32), torch.randn(32)
    for name, arguments in (
        ("scale_backward", (grad, x, scale, center)),
        ("gram", (x, grad, 16, 8, 1)),
        ("gram", (x, grad, 8, 4, 2)),
    ):
        wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
        reference = _backend._ops[name].reference
        triples = zip(*map(_tuple, (getattr(raw, name)(*arguments), reference(*arguments),
                                    reference(*wide))), strict=True)  # fmt: skip
        for ours, theirs, exact in triples:
            bound = 2 * (theirs - exact).norm() + 1e-7 * exact.norm()
            assert (ours - exact).norm() <= bound, name


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("cayley", (torch.zeros(2, 4),), r"b\(b-1\)/2"),
        ("cayley", (torch.zeros(2, 6).half(),), "expected float32, float64 or bfloat16"),
        ("cayley_backward", (torch.zeros(2, 3, 3), torch.zeros(1, 3, 3)), "shape of blocks"),
        ("compose", (torch.zeros(2, 3, 4, 4), 0), "not a butterfly"),
        ("compose", (torch.zeros(0, 4, 4, 4), 0), "not a butterfly"),
        ("compose", (torch.zeros(2, 4, 4, 4), -1), "not a butterfly"),
        ("compose", (torch.zeros(2, 4, 4, 4), 62), "not a butterfly"),
        ("compose_backward", (torch.zeros(2, 4, 4, 4), torch.zeros(1, 8, 8), 0), "stage matrices"),
        ("compose", (torch.zeros(2, 4, 4, 4).bfloat16(), 0), "float32 or float64"),
        ("rotate", (torch.zeros(3, 12), torch.zeros(1, 8, 8), 4, 1, False), "does not fit"),
        ("rotate", (torch.zeros(3, 16), torch.zeros(1, 8, 8), 4, 1, False), "d / size matrices"),
        ("rotate", (torch.zeros(3, 16), torch.zeros(2, 8, 8).double(), 4, 1, False), "dtype of x"),
        ("rotate", (torch.zeros(3, 16), torch.zeros(2, 8, 8), 0, 1, False), "does not fit"),
        ("rotate", (torch.zeros(3, 0), torch.zeros(0, 4, 4), 4, 1, False), "does not fit"),
        ("rotate", (torch.zeros(3, 8), torch.zeros(2, 4, 4), 1, 2**62, False), "does not fit"),
        ("gram", (torch.zeros(3, 3), torch.zeros(3, 3), 3, 1, 0x5555555555555555), "does not fit"),
        ("cayley_backward", (torch.zeros(2, 0, 0), torch.zeros(2, 0, 0)), "square blocks"),
        ("gram", (torch.zeros(3, 16), torch.zeros(2, 16), 8, 4, 1), "shape and dtype of x"),
        ("scale_backward", (*[torch.zeros(3, 4)] * 2, *[torch.zeros(3)] * 2), "scale"),
    ],
)
def test_raw_ops_check_their_arguments(name, arguments, match):
    """No shape may make a kernel read outside its tensors, whoever calls it."""
    with pytest.raises(RuntimeError, match=match):
        getattr(raw, name)(*arguments)
