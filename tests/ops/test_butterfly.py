"""The butterfly product against two dense references that share nothing with it."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boft_ops import butterfly_matmul, cayley
from boft_ops.ops.compose import compose
from boft_ops.ops.rotate import rotate
from boft_ops.ops.stages import _plan, plan

# (m, b, d): one factor with odd b and unconstrained; spans below, at and above one stage; K odd
SHAPES = [
    (1, 1, 3),
    (1, 5, 15),
    (1, 12, 12),
    (2, 8, 16),
    (2, 8, 48),
    (3, 4, 32),
    (3, 6, 24),
    (4, 4, 96),
    (6, 2, 64),
    (7, 4, 256),
    (8, 4, 512),
    (5, 16, 256),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def is_slow_in_interpreter(backend, d, transpose, **_):
    """True for seconds of Triton's interpreter: one direction of d = 256 is enough of a sample."""
    return backend == "triton" and (d > 256 or (d == 256 and transpose))


def random_blocks(m, b, d, dtype=torch.float64, orthogonal=False):
    if orthogonal:
        return cayley(0.3 * torch.randn(m, d // b, b * (b - 1) // 2, dtype=torch.float64)).to(dtype)
    return (torch.randn(m, d // b, b, b, dtype=torch.float64) / b**0.5).to(dtype)


@pytest.mark.parametrize(("m", "b", "d"), SHAPES)
def test_references_agree(m, b, d):
    """Feature map and permutation matrices define the same factors."""
    blocks = random_blocks(m, b, d)
    for i in range(m):
        assert torch.equal(reference.factor(blocks, i), reference.permuted_factor(blocks, i))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("m", "b", "d"), SHAPES)
@pytest.mark.exhaustive_if(condition=is_slow_in_interpreter)
def test_forward_and_backward(backend, m, b, d, transpose):
    blocks = random_blocks(m, b, d).requires_grad_()
    x = torch.randn(2, 3, d, dtype=torch.float64, requires_grad=True)
    r = reference.rotation(blocks)
    expected = x @ (r.T if transpose else r)
    y = butterfly_matmul(x, blocks, transpose=transpose)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, blocks), upstream)
    for got, want in zip(grads, torch.autograd.grad(expected, (x, blocks), upstream), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("pass_cost", [0, 4, 64, 10**6])
@pytest.mark.parametrize(("m", "b", "d"), [(2, 8, 48), (6, 2, 64), (7, 4, 256), (3, 6, 24)])
def test_every_plan_gives_the_same_product(m, b, d, pass_cost):
    stages = plan(m, b, pass_cost)
    blocks = random_blocks(m, b, d)
    x = torch.randn(5, d, dtype=torch.float64)
    r = reference.rotation(blocks)
    for transpose in (False, True):
        y = rotate(x, compose(blocks, stages), stages, transpose)
        torch.testing.assert_close(y, x @ (r.T if transpose else r))


def test_plan_covers_the_factors_once():
    assert len(_plan(7, 4, 10**6)) == 1  # reading x is dear: one dense stage
    assert len(_plan(7, 4, 0)) > 3  # reading x is free: no wasted multiplication
    assert len(plan(6, 8, "cuda")) == 1 < len(plan(6, 8, "cpu"))
    for m in range(1, 13):
        for b in (2, 4, 8, 64):
            stages = plan(m, b)
            assert [s.first for s in stages] == [0, *(s.last for s in stages[:-1])]
            assert stages[-1].last == m
            for s in stages:
                assert s.stride == 2**s.first
                assert s.size % s.chunk == 0
                assert s.size == (b if m == 1 else (b // 2) << (s.last - s.first))


@pytest.mark.parametrize(("m", "b", "d"), [(2, 8, 768), (1, 4, 64), (6, 8, 4096), (12, 8, 16384)])
def test_partial_sums_on_a_gpu_are_enough_and_small(m, b, d):
    """Most of an H200's multiprocessors have a program, as far as 16 MB of sums allow."""
    x = torch.empty(1, d, device="meta")
    assert all(stage.splits(torch.empty(1, d)) == 1 for stage in plan(m, b, "cpu"))
    for stage in plan(m, b, "cuda"):
        splits = stage.splits(x)
        assert splits == 1 or splits * d * stage.size * 4 <= 16 << 20
        widest = 256  # features of a program
        assert splits * d // widest >= 60 or 2 * splits * d * stage.size * 4 > 16 << 20


@pytest.mark.parametrize("m", [9, 10, 12, 13])
def test_full_density_of_large_butterflies(m):
    """d up to 16384, m maximal: against a product factor by factor, through views alone."""
    b = 8
    d = b << (m - 1) if m < 13 else 16384
    if m == 13:
        b, m = 4, 13
    blocks = random_blocks(m, b, d, torch.float32, orthogonal=True)
    x = torch.randn(3, d)
    expected = x.double()
    for i in reversed(range(m)):
        r, stride = b // 2, 2**i
        runs = expected.reshape(3, d // (2 * stride * r), 2, stride, r)
        rows = runs.permute(1, 3, 0, 2, 4).reshape(d // b, 3, b)  # blocks in the order (g, c)
        rows = rows @ blocks[i].double()
        runs = rows.reshape(d // (2 * stride * r), stride, 3, 2, r).permute(2, 0, 3, 1, 4)
        expected = runs.reshape(3, d)
    y = butterfly_matmul(x, blocks)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("m", "b", "d"), [(1, 3, 6), (2, 4, 8), (3, 2, 8), (7, 4, 256)])
@pytest.mark.exhaustive_if(
    condition=lambda backend, m, transpose, **_: backend == "triton" and (m > 2 or transpose)
)
def test_gradcheck(backend, m, b, d, transpose):
    if backend == "triton" and d > 100:
        pytest.skip("forty seconds in the interpreter; the smaller shapes take every path")
    x = torch.randn(2, d, dtype=torch.float64, requires_grad=True)
    blocks = random_blocks(m, b, d).requires_grad_()

    def function(x, blocks):
        return butterfly_matmul(x, blocks, transpose=transpose)

    assert torch.autograd.gradcheck(function, (x, blocks), fast_mode=d > 8)
    assert torch.autograd.gradgradcheck(function, (x, blocks), fast_mode=True)


@pytest.mark.parametrize("leading", [(), (1,), (0,), (3, 0), (2, 1, 5)])
def test_leading_dimensions(backend, leading):
    blocks = random_blocks(2, 4, 16).requires_grad_()
    x = torch.randn(*leading, 16, dtype=torch.float64, requires_grad=True)
    y = butterfly_matmul(x, blocks)
    assert y.shape == x.shape
    torch.testing.assert_close(y, x @ reference.rotation(blocks))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert blocks.grad.isfinite().all()


@pytest.mark.parametrize("make", ["transposed", "sliced", "expanded", "offset"])
def test_strides(backend, make):
    x = {
        "transposed": torch.randn(16, 6, dtype=torch.float64).T,
        "sliced": torch.randn(12, 40, dtype=torch.float64)[::2, 3:35:2],
        "expanded": torch.randn(1, 16, dtype=torch.float64).expand(6, 16),
        "offset": torch.randn(6 * 16 + 1, dtype=torch.float64)[1:].view(6, 16),
    }[make]
    blocks = random_blocks(2, 4, 16).permute(0, 1, 3, 2)  # not contiguous either
    upstream = torch.randn(16, 6, dtype=torch.float64).T
    x, blocks = x.detach().requires_grad_(), blocks.detach().requires_grad_()
    got = torch.autograd.grad(butterfly_matmul(x, blocks), (x, blocks), upstream)
    want = torch.autograd.grad(x @ reference.rotation(blocks), (x, blocks), upstream)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("blocks_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_against_float64(backend, dtype, blocks_dtype):
    """Error <= 2x that of the same computation with dense matrices in the same dtype."""
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("no C++ kernels in float16: the reference serves")
    m, b, d = 4, 4, 64
    blocks = random_blocks(m, b, d, blocks_dtype or dtype, orthogonal=True)
    x = torch.randn(64, d).to(dtype)
    y = butterfly_matmul(x, blocks)
    assert y.dtype == dtype
    exact = x.double() @ reference.rotation(blocks.double())
    dense = x @ reference.rotation(blocks.double()).to(dtype)
    error = (y.double() - exact).norm()
    assert error <= 2 * (dense.double() - exact).norm() + 1e-15 * d


def test_half_precision_rounds_the_update_not_the_rotation():
    """bfloat16 has no number between 1 - 2^-8 and 1, where a small rotation's diagonal lies."""
    x = torch.randn(4096, 64).bfloat16()
    blocks = cayley(2e-2 * torch.randn(2, 8, 28))
    rounded = reference.rotation(blocks.double()).bfloat16()

    def drift(y):
        return (y.double().square().sum() / x.double().square().sum() - 1).abs()

    plain = drift((x.float() @ rounded.float()).bfloat16())
    assert drift(butterfly_matmul(x, blocks)) < 0.2 * plain


def test_identity_blocks_change_nothing():
    for dtype in DTYPES:
        x = torch.randn(7, 48).to(dtype)
        for m, b in ((1, 3), (2, 8), (4, 2), (5, 6)):
            if 48 // b % 2 ** (m - 1):
                continue
            blocks = torch.eye(b).expand(m, 48 // b, b, b)
            assert torch.equal(butterfly_matmul(x, blocks), x)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from([2, 4, 6, 8]),
    st.integers(1, 3),
    st.integers(0, 9),
    st.integers(0, 2**32 - 1),
)
def test_properties(m, b, groups, n, seed):
    d = groups * b << (m - 1)
    generator = torch.Generator().manual_seed(seed)
    shape = (m, d // b, b * (b - 1) // 2)
    blocks = cayley(torch.randn(shape, dtype=torch.float64, generator=generator))
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    y = butterfly_matmul(x, blocks)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(butterfly_matmul(y, blocks, transpose=True), x)
    span = b << (m - 1)  # R mixes groups of this many features and no others
    alone = torch.zeros_like(x)
    alone[:, :span] = x[:, :span]
    torch.testing.assert_close(butterfly_matmul(alone, blocks)[:, span:], alone[:, span:])
    torch.testing.assert_close(butterfly_matmul(alone, blocks)[:, :span], y[:, :span])


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("m", "b", "d"), [(2, 8, 48), (7, 8, 512)])  # one stage and two
def test_compiled_without_gradients(m, b, d, transpose):
    x, blocks = torch.randn(4, d), random_blocks(m, b, d, torch.float32, orthogonal=True)
    compiled = torch.compile(butterfly_matmul, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = butterfly_matmul(x, blocks, transpose=transpose)
        torch.testing.assert_close(compiled(x, blocks, transpose=transpose), expected)


def test_saved_for_backward():
    x = torch.randn(1000, 512, requires_grad=True)
    saved = []
    blocks = random_blocks(8, 4, 512, torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        butterfly_matmul(x, blocks)
    large = [t for t in saved if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
    assert sum(t.numel() for t in saved) - x.numel() <= 8 * blocks.numel()


def test_frozen_blocks_save_nothing_of_the_inputs_size():
    x, saved = torch.randn(1000, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        butterfly_matmul(x, random_blocks(2, 8, 64, torch.float32)).sum().backward()
    assert sum(t.numel() for t in saved) < x.numel() / 8
    assert x.grad is not None


@pytest.mark.parametrize(
    ("x", "blocks", "error", "match"),
    [
        (
            torch.zeros(2, 16),
            torch.zeros(2, 4, 4),
            ValueError,
            r"blocks: expected shape.*\(2, 4, 4\)",
        ),
        (torch.zeros(2, 16), torch.zeros(1, 4, 4, 3), ValueError, "blocks: expected shape"),
        (
            torch.zeros(2, 15),
            torch.zeros(1, 4, 4, 4),
            ValueError,
            r"x: expected.*16, got.*\(2, 15\)",
        ),
        (
            torch.zeros(2, 12),
            torch.zeros(3, 3, 4, 4),
            ValueError,
            r"n_factors: expected 12/4 = 3.*Nearest",
        ),
        (
            torch.zeros(2, 15),
            torch.zeros(2, 5, 3, 3),
            ValueError,
            "block_size: expected an even number",
        ),
        (torch.zeros(()), torch.zeros(1, 4, 4, 4), ValueError, "x: expected at least 1 dimension"),
        (torch.zeros(2, 16).long(), torch.zeros(1, 4, 4, 4), TypeError, "x: expected a dtype"),
        (torch.zeros(2, 16), [0.0], TypeError, "blocks: expected a torch.Tensor, got list"),
        (
            torch.zeros(2, 16),
            torch.zeros(1, 4, 4, 4, device="meta"),
            ValueError,
            "blocks: expected the device",
        ),
    ],
)
def test_bad_arguments(x, blocks, error, match):
    with pytest.raises(error, match=match):
        butterfly_matmul(x, blocks)
