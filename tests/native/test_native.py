"""The C++ kernels against the plain-torch references of the same ops, and against float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boft_ops._runtime import backend, native
from boft_ops._runtime.namespace import NS

pytestmark = pytest.mark.skipif(
    "rotate" not in native.kernels("cpu"), reason="no native library (test_backend says why)"
)
raw = getattr(torch.ops, NS)
DTYPES = [torch.float32, torch.float64]
ROW_DTYPES = [*DTYPES, torch.bfloat16]  # dtypes of activations; the matrices are at least float32
# (n factors, block_size, first): neighbours and strides, sizes below, at and above a vector's
STAGES = [(1, 2, 0), (2, 2, 0), (1, 6, 1), (2, 8, 0), (2, 6, 2), (3, 4, 1), (4, 4, 0), (3, 16, 0)]


def agree(name, *arguments, eps=None):
    """Kernel and reference of an op give the same, within rounding; a half's is of the output."""
    got = getattr(raw, name)(*arguments)
    want = backend.ops()[name].reference(*arguments)
    for g, w in zip(_tuple(got), _tuple(want), strict=True):
        assert g.dtype == w.dtype
        assert g.shape == w.shape
        unit = eps or torch.finfo(w.dtype).eps
        bound = 4 if w.dtype == torch.bfloat16 else 64
        torch.testing.assert_close(g, w, rtol=bound * unit, atol=bound * unit * largest(w))


def largest(t):
    return t.abs().amax().item() if t.numel() else 0.0


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def stage_of(n, b, first, dtype, runs=2):
    n_blocks = runs << (n - 1 + first)
    factors = torch.randn(n, n_blocks, b, b, dtype=dtype)
    return factors, backend.ops()["compose"].reference(factors, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "b", "first"), STAGES)
def test_compose(n, b, first, dtype):
    factors, stage = stage_of(n, b, first, dtype)
    agree("compose", factors, first)
    agree("compose_backward", factors, torch.randn_like(stage)[None], first)
    agree("compose_backward", factors.mT, stage.mT[None], first)  # strides


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 3, 8, 17, 67])
@pytest.mark.parametrize(("n", "b", "first"), STAGES)
def test_rotate_and_its_gradients(n, b, first, rows, dtype):
    factors, stage = stage_of(n, b, first, wide(dtype))
    stage /= stage.shape[-1] ** 0.5
    d, chunk, stride = factors.shape[1] * b, b // 2, 1 << first
    x, g = torch.randn(rows, d, dtype=dtype), torch.randn(d, rows, dtype=dtype).T
    factor = torch.randn(2 * rows, dtype=wide(dtype))[::2]
    for transpose in (False, True):
        if dtype != torch.bfloat16:  # whose reference rounds R - I: compared with float64 below
            agree("rotate", x, stage, chunk, stride, transpose)
            agree("rotate", g, stage.mT, chunk, stride, transpose)
            agree("rotate", x, stage, chunk, stride, transpose, factor)
            agree("rotate_backward", g, x, stage, chunk, stride, transpose, 1)
            continue
        exact = raw.rotate(x.double(), stage.double(), chunk, stride, transpose)
        y = raw.rotate(x, stage, chunk, stride, transpose)
        assert y.dtype == dtype
        assert torch.equal(y, exact.to(dtype)) or close_in_bfloat16(y, exact)
        y = raw.rotate(x, stage, chunk, stride, transpose, factor)
        assert close_in_bfloat16(y, exact * factor[:, None])  # rounded once
        dx, gram = raw.rotate_backward(g, x, stage, chunk, stride, transpose, 1)
        exact = raw.rotate_backward(
            g.double(), x.double(), stage.double(), chunk, stride, transpose, 1
        )
        assert close_in_bfloat16(dx, exact[0])
        torch.testing.assert_close(gram.double(), exact[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            raw.rotate_stage_grad(
                *((g, x) if transpose else (x, g)), stage.shape[-1], chunk, stride, 1
            ),
            gram,
        )


def close_in_bfloat16(got, exact):
    """One rounding of what was summed in float32: half a unit in the last place, and a little."""
    return ((got.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 40, 300])
@pytest.mark.parametrize(("n", "b", "first"), STAGES[::2])
def test_rotate_indexed(n, b, first, rows, dtype):
    """Each row is what rotate makes of it with its own matrices, to the bit, in any order."""
    stages = torch.stack([stage_of(n, b, first, wide(dtype))[1] for _ in range(3)])
    stages /= stages.shape[-1] ** 0.5
    d, layout = stages.shape[1] * stages.shape[2], (b // 2, 1 << first)
    x = torch.randn(d, rows).to(dtype).T
    for index in (torch.randint(-2, 4, (rows,)).int(), torch.arange(rows).div(7).int() % 4 - 1):
        for transpose in (False, True):
            y = raw.rotate_indexed(x, stages, index, *layout, transpose)
            assert torch.equal(y[index == -1], x[index == -1])
            assert y[(index < -1) | (index > 2)].isnan().all()
            for i, stage in enumerate(stages):
                want = raw.rotate(x, stage, *layout, transpose)
                assert torch.equal(y[index == i], want[index == i])


# no row; none in the first, one in the second, some in none; cut where they descend or leave N
ENDS = {0: [0, 0], 1: [0, 1], 40: [0, 1, 23, 37], 300: [120, 100, 290, 2**31 - 1, -5, 300]}


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@pytest.mark.parametrize("rows", ENDS)
@pytest.mark.parametrize(("n", "b", "first"), STAGES[::2])
def test_segment_stage_grads(n, b, first, rows, dtype):
    """Each segment has what rotate_stage_grad makes of its rows alone, to the bit."""
    size, stride = b << (n - 1), 1 << first
    x, g = torch.randn(rows, 4 * size * stride).to(dtype), torch.randn(4 * size * stride, rows).T
    g, ends = g.to(dtype), torch.tensor(ENDS[rows], dtype=torch.int32)
    (got,) = raw.segment_stage_grads(x, g, ends, size, b // 2, stride, 1)
    assert got.shape == (len(ends), 4 * stride, size, size)
    begin = 0
    for gram, end in zip(got, ENDS[rows], strict=True):
        own = slice(max(begin, 0), max(end, begin, 0))
        want = raw.rotate_stage_grad(x[own], g[own], size, b // 2, stride, 1)
        assert torch.equal(gram, want[0])
        begin = end


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 5, 7, 12, 20, 100])
def test_one_factor_of_any_size(size, dtype):
    """OFT: sizes that no vector divides."""
    x, g = torch.randn(9, 2 * size, dtype=dtype), torch.randn(9, 2 * size, dtype=dtype)
    stage = torch.randn(2, size, size, dtype=dtype)
    agree("rotate", x, stage, size, 1, False)
    agree("rotate_stage_grad", x, g, size, size, 1, 1)
    agree("rotate_backward", g, x, stage, size, 1, False, 1)
    agree("compose", stage[None], 0)


def masks(m, n_blocks):
    some = torch.arange(m * n_blocks).reshape(m, n_blocks) % 3 == 0
    return (None, some, torch.ones(m, n_blocks, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("b", [1, 2, 3, 4, 7, 8, 11, 16, 32])
def test_cayley_with_dropped_blocks(b, dtype):
    skew = (torch.randn(2, 11, b * (b - 1) // 2) / b).to(dtype)  # 22 blocks: the last tile is cut
    for drop in masks(2, 11):
        blocks = raw.cayley(skew, drop)
        agree("cayley", skew, drop)
        agree("cayley_backward", blocks, drop, torch.randn_like(blocks))
        if drop is not None:
            assert (blocks[drop] == torch.eye(b)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "b"), [(1, 3), (1, 8), (2, 8), (4, 4), (6, 2), (2, 32), (3, 10)])
def test_rotation(m, b, dtype):
    n_blocks = 3 << (m - 1)
    skew = torch.randn(m, n_blocks, b * (b - 1) // 2, dtype=dtype) / b
    for drop in masks(m, n_blocks):
        blocks, stage = raw.stage_from_skew(skew, drop)
        assert torch.equal(blocks, raw.cayley(skew, drop))
        agree("stage_from_skew", skew, drop)
        # the gradient of a stage has all the blocks in it: errors add up
        agree("stage_from_skew_backward", blocks, drop, torch.randn_like(stage)[None])


def linear_arguments(rows, d, n, size, generator=None, offset=0):
    """With an offset views of one piece of memory, at any alignment; else tensors of their own,
    beyond the end of which nothing may be touched."""
    sizes = (rows * d, n * d, d * size, n, n, rows * n, rows * n)
    memory = torch.randn(sum(sizes) + offset, generator=generator)[offset:]
    x, weight, stage, scale, bias, grad, z = memory.split(sizes)
    x, weight, stage = x.view(rows, d), weight.view(n, d), stage.view(d // size, size, size)
    stage /= size**0.5
    views = (x, weight, stage, scale, bias, grad.view(rows, n), z.view(rows, n))
    return views if offset else tuple(t.clone() for t in views)


def check_linear(x, weight, stage, scale, bias, grad, z):
    """At most twice the error of the reference in float32, against float64, or what rounding may
    make of single sums, which may cancel: measured by the same sums of absolute values."""
    for s, save, in_z in ((scale, True, False), (scale, True, True), (None, False, False)):
        forward = x, weight, stage, s, bias if save else None, in_z, save
        center = bias if in_z else None
        backward = grad, x, weight, stage, s, center, z if save else None, 1, True
        for name, args in (("rotated_linear", forward), ("rotated_linear_backward", backward)):
            op, ours = backend.ops()[name].reference, getattr(raw, name)
            exact = op(*[a.double() if isinstance(a, torch.Tensor) else a for a in args])
            sizes = [a.double().abs() if isinstance(a, torch.Tensor) else a for a in args]
            if args is backward and in_z:
                sizes[5] = -sizes[5]  # subtracted numbers add to the size of the sum
            sizes = op(*sizes)
            for got, want, truth, size in zip(ours(*args), op(*args), exact, sizes, strict=True):
                assert got.shape == want.shape
                assert ((got - truth).abs() <= 32 * torch.finfo(torch.float32).eps * size).all()
                if got.numel() > 1000:
                    error, allowed = (got - truth).norm(), (want - truth).norm()
                    assert error <= 2 * allowed + 1e-7 * truth.norm(), (error, allowed)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 192])
def test_linear_for_every_size(size):
    check_linear(*linear_arguments(70, 2 * size, 29, size))


@pytest.mark.parametrize("rows", [0, 1, 31, 33, 511, 512, 513, 1025, 1600])
def test_linear_across_panels_and_blocks(rows):
    check_linear(*linear_arguments(rows, 208, 205, 16))


def test_linear_across_depths():
    check_linear(*linear_arguments(40, 784, 530, 8))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 140), st.integers(1, 30), st.integers(1, 300), st.sampled_from([2, 4, 6, 16]),
    st.integers(0, 3), st.integers(0, 2**31),
)  # fmt: skip
def test_linear_of_any_shape_and_alignment(rows, groups, n, size, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    check_linear(*linear_arguments(rows, groups * size, n, size, generator, offset))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(STAGES), st.integers(0, 40), st.integers(0, 3), st.booleans(),
    st.sampled_from(ROW_DTYPES), st.integers(0, 2**31),
)  # fmt: skip
def test_rotate_of_any_strides_and_alignment(shape, rows, offset, broadcast, dtype, seed):
    """Views into larger memory, and a gradient that is one row for all (as sum() hands it)."""
    generator = torch.Generator().manual_seed(seed)
    n, b, first = shape
    d = b << (n - 1 + first)
    memory = torch.randn(rows + 1, 2 * d + offset, generator=generator).to(dtype)
    x = memory[1:, offset : offset + d]
    grad = memory[:1, :d].expand(rows, d) if broadcast else memory[1:, d:][:, :d]
    stage = torch.randn(1 << first, d >> first, d >> first, generator=generator).to(wide(dtype))
    arguments = (grad, x, stage, b // 2, 1 << first, True, 1)
    got = raw.rotate_backward(*arguments)
    same = raw.rotate_backward(grad.clone(), x.clone(), *arguments[2:])
    assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True))
    y = raw.rotate(grad, stage, b // 2, 1 << first, False)
    assert torch.equal(got[0], y)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(1, 1100), st.integers(0, 3), st.integers(0, 2**31))
def test_scale_backward(rows, n, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randn(2 * rows * n + 2 * n + offset, generator=generator)[offset:]  # unaligned
    grad, x = memory[: rows * n].view(rows, n), memory[rows * n : 2 * rows * n].view(rows, n)
    scale, center = memory[-n:], memory[-2 * n : -n]
    for dtype in (torch.float32, torch.bfloat16):
        grad, x = grad.to(dtype), x.to(dtype)
        x_grad, scale_grad, bias_grad = raw.scale_backward(grad, x, scale, center)
        assert torch.equal(x_grad, (grad * scale).to(dtype))
        none, *sums = raw.scale_backward(grad, x, None, center)
        assert none.shape == (0, n)
        assert all(map(torch.equal, sums, (scale_grad, bias_grad)))
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
        ("rotate_stage_grad", (x, grad, 16, 8, 1, 1)),
        ("rotate_stage_grad", (x, grad, 8, 4, 2, 1)),
        (
            "rotated_linear_backward",
            (grad, x, torch.eye(32), torch.eye(16).repeat(2, 1, 1), scale, None, x, 1, True),
        ),
    ):
        exact = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
        reference = backend.ops()[name].reference
        triples = zip(*map(_tuple, (getattr(raw, name)(*arguments), reference(*arguments),
                                    reference(*exact))), strict=True)  # fmt: skip
        for ours, theirs, truth in triples:
            bound = 2 * (theirs - truth).norm() + 1e-7 * truth.norm()
            assert (ours - truth).norm() <= bound, name


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.exhaustive
@pytest.mark.skipif("BOFT_OPS_CPU_ISA" in os.environ, reason="one of them is being tested")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets(isa):
    """The same tests on what this machine would not choose."""
    order = ("baseline", "avx2", "avx512")
    if order.index(isa) >= order.index(native.isa):
        pytest.skip(f"this machine runs on {native.isa} itself")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "BOFT_OPS_CPU_ISA": isa},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]


def test_the_instruction_set_is_the_one_asked_for():
    wanted = os.environ.get("BOFT_OPS_CPU_ISA")
    assert native.isa in ("baseline", "avx2", "avx512")
    assert wanted is None or native.isa == wanted


@pytest.mark.parametrize("wanted", ["foo", "AVX2", "avx512"])
def test_an_instruction_set_that_is_not_there_is_an_error(monkeypatch, wanted):
    """When the library is looked for, at import; a name that is none, also without a library."""
    if wanted == (native.isa or "avx512"):
        pytest.skip("nothing is wrong with it")
    monkeypatch.setenv("BOFT_OPS_CPU_ISA", wanted)
    monkeypatch.delitem(vars(raw), "_native_library", raising=False)
    if wanted not in native.ISAS:
        monkeypatch.setattr(native, "_candidates", lambda faults: pytest.fail("looked for one"))
    with pytest.raises(ValueError, match=f"BOFT_OPS_CPU_ISA: expected .*, got '{wanted}'"):
        native.load()


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("cayley", (torch.zeros(2, 4), None), r"b\(b-1\)/2"),
        ("cayley", (torch.zeros(2, 6).half(), None), "expected float32, float64 or bfloat16"),
        ("cayley", (torch.zeros(2, 6), torch.zeros(3, dtype=torch.bool)), "boolean for each"),
        ("cayley", (torch.zeros(2, 6), torch.zeros(2)), "boolean for each"),
        ("cayley_backward", (torch.zeros(2, 3, 3), None, torch.zeros(1, 3, 3)), "shape and dtype"),
        ("cayley_backward", (torch.zeros(2, 0, 0), None, torch.zeros(2, 0, 0)), "square blocks"),
        ("compose", (torch.zeros(2, 3, 4, 4), 0), "not a butterfly"),
        ("compose", (torch.zeros(0, 4, 4, 4), 0), "not a butterfly"),
        ("compose", (torch.zeros(2, 4, 3, 3), 0), "not a butterfly"),
        ("compose", (torch.zeros(2, 4, 4, 4), -1), "not a butterfly"),
        ("compose", (torch.zeros(2, 4, 4, 4), 62), "not a butterfly"),
        ("compose", (torch.zeros(2, 4, 4, 4).bfloat16(), 0), "float32 or float64"),
        ("compose_backward", (torch.zeros(2, 4, 4, 4), torch.zeros(1, 1, 8, 8), 0), "stage matri"),
        ("compose_backward", (torch.zeros(2, 4, 4, 4), torch.zeros(2, 2, 8, 8), 0), "stage matri"),
        ("stage_from_skew", (torch.zeros(2, 3, 6), None), "not a butterfly"),
        ("stage_from_skew", (torch.zeros(3, 6), None), "3 dimensions"),
        (
            "stage_from_skew_backward",
            (torch.zeros(2, 4, 4, 4), None, torch.zeros(2, 8, 8)),
            "stage matri",
        ),
        ("rotate", (torch.zeros(3, 12), torch.zeros(1, 8, 8), 4, 1, False), "does not fit"),
        ("rotate", (torch.zeros(3, 16), torch.zeros(1, 8, 8), 4, 1, False), "d / size matrices"),
        ("rotate", (torch.zeros(3, 16), torch.zeros(2, 8, 8).double(), 4, 1, False), "dtype of x"),
        ("rotate", (torch.zeros(3, 16), torch.zeros(2, 8, 8), 0, 1, False), "does not fit"),
        ("rotate", (torch.zeros(3, 0), torch.zeros(0, 4, 4), 4, 1, False), "does not fit"),
        ("rotate", (torch.zeros(3, 8), torch.zeros(2, 4, 4), 1, 2**62, False), "does not fit"),
        (
            "rotate_indexed",
            (torch.zeros(3, 8), torch.zeros(2, 8, 8), torch.zeros(3).int(), 4, 1, False),
            "square blocks",
        ),
        (
            "rotate_indexed",
            (torch.zeros(3, 16), torch.zeros(2, 1, 8, 8), torch.zeros(3).int(), 4, 1, False),
            "d / size, size, size",
        ),
        (
            "rotate_indexed",
            (torch.zeros(3, 16), torch.zeros(2, 2, 8, 8), torch.zeros(2).int(), 4, 1, False),
            "an int32 for each row",
        ),
        (
            "rotate_indexed",
            (torch.zeros(3, 16), torch.zeros(2, 2, 8, 8), torch.zeros(3).long(), 4, 1, False),
            "an int32 for each row",
        ),
        (
            "rotate_stage_grad",
            (*[torch.zeros(3, 3)] * 2, 3, 1, 0x5555555555555555, 1),
            "does not fit",
        ),
        (
            "rotate_stage_grad",
            (torch.zeros(3, 16), torch.zeros(2, 16), 8, 4, 1, 1),
            "shape and dtype of x",
        ),
        ("rotate_stage_grad", (*[torch.zeros(3, 16)] * 2, 8, 4, 1, 2), "expected 1 on a CPU"),
        (
            "segment_stage_grads",
            (torch.zeros(3, 16), torch.zeros(3, 8), torch.zeros(2).int(), 8, 4, 1, 1),
            "shape and dtype of x",
        ),
        (
            "segment_stage_grads",
            (*[torch.zeros(3, 16)] * 2, torch.zeros(2).long(), 8, 4, 1, 1),
            "an int32 for each segment",
        ),
        (
            "segment_stage_grads",
            (*[torch.zeros(3, 16)] * 2, torch.zeros(2).int(), 8, 4, 1, 2),
            "expected 1 on a CPU",
        ),
        (
            "rotate_backward",
            (torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(2, 4, 4), 4, 1, False, 1),
            "shape and dtype of x",
        ),
        ("scale_backward", (*[torch.zeros(3, 4)] * 2, *[torch.zeros(3)] * 2), "scale"),
        ("scale_backward", (*[torch.zeros(3, 4)] * 2, None, torch.zeros(3)), "scale"),
        (
            "rotate",
            (torch.zeros(3, 8), torch.zeros(2, 4, 4), 4, 1, False, torch.zeros(2)),
            r"factor: expected \(rows,\)",
        ),
        (
            "rotate",
            (torch.zeros(3, 8), torch.zeros(2, 4, 4), 4, 1, False, torch.zeros(3).double()),
            r"factor: expected \(rows,\)",
        ),
        (
            "rotated_linear",
            (torch.zeros(3, 8), torch.zeros(4, 9), torch.zeros(2, 4, 4), None, None, False, False),
            r"weight \(n, d\)",
        ),
        (
            "rotated_linear",
            (torch.zeros(3, 10), torch.zeros(4, 10), torch.zeros(2, 5, 5), None, None, False, True),
            "divides 192",
        ),
        (
            "rotated_linear",
            (*[torch.zeros(4, 8)] * 2, torch.zeros(2, 4, 4), torch.zeros(3), None, False, True),
            r"scale, bias: expected \(n,\)",
        ),
        (
            "rotated_linear_backward",
            (*[torch.zeros(3, 4), torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(2, 4, 4)],
             None, None, torch.zeros(2, 4), 1, False),
            r"grad, z: expected \(rows, n\)",
        ),
        (
            "rotated_linear_backward",
            (*[torch.zeros(3, 4), torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(2, 4, 4)],
             None, None, None, 2, False),
            "splits: expected 1",
        ),
    ],
)  # fmt: skip
def test_raw_ops_check_their_arguments(name, arguments, match):
    """No shape may make a kernel read outside its tensors, whoever calls it."""
    with pytest.raises(RuntimeError, match=match):
        getattr(raw, name)(*arguments)
