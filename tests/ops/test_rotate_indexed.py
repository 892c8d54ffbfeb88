"""butterfly_matmul_indexed: each row as butterfly_matmul has it with its own adapter's blocks."""

import pytest
import torch
from torch.func import vmap

from boft_ops import (
    butterfly_matmul,
    butterfly_matmul_indexed,
    butterfly_matmul_segments,
    cayley,
)
from boft_ops._runtime import backend as backends
from boft_ops.ops import rotate_indexed
from boft_ops.ops.segment_stage_grads import segment_stage_grads_reference

SHAPES = [(1, 4, 16), (1, 3, 9), (2, 8, 32), (3, 4, 32), (8, 4, 512)]  # m, b, d; two stages last


def adapters(m, b, d, n=3, dtype=torch.float32):
    skew = 0.3 * torch.randn(n, m, d // b, b * (b - 1) // 2, dtype=torch.float64)
    return cayley(skew).to(dtype)


def one_by_one(x, blocks, index, transpose=False):
    with backends.force("reference"):
        rows = [
            row if i < 0 else butterfly_matmul(row[None], blocks[i], transpose=transpose)[0]
            for row, i in zip(x, index.tolist(), strict=True)
        ]
    return torch.stack(rows)


@pytest.fixture
def small(backend, request):
    """The interpreter takes minutes for wide rows; what they add is two stages, in Python."""
    if backend == "triton" and request.getfixturevalue("d") > 100:
        pytest.skip("left to the other backends")


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("m", "b", "d"), SHAPES)
def test_rows_have_their_own_rotation(small, m, b, d, transpose):
    x, blocks = torch.randn(11, d), adapters(m, b, d)
    for index in (torch.randint(-1, 3, (11,)), torch.arange(11) // 3 - 1):
        got = butterfly_matmul_indexed(x, blocks, index, transpose=transpose)
        want = one_by_one(x, blocks, index, transpose)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(got[index < 0], x[index < 0])


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("m", "b", "d"), SHAPES)
def test_gradients(small, m, b, d, transpose):
    x, blocks = torch.randn(12, d), adapters(m, b, d)
    index, upstream = torch.tensor([2, 2, 0, -1] * 3), torch.randn(d, 12).T  # adapter 1 has no row
    leaves = x.requires_grad_(), blocks.requires_grad_()
    grads = []
    for function in (butterfly_matmul_indexed, one_by_one):
        y = function(*leaves, index, transpose=transpose)
        grads.append(torch.autograd.grad(y, leaves, upstream))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (grads[0][1][1] == 0).all()


@pytest.mark.parametrize(("m", "b", "d", "transpose"), [(1, 3, 6, True), (3, 2, 8, False)])
def test_gradcheck(m, b, d, transpose):
    x = torch.randn(4, d, dtype=torch.float64, requires_grad=True)
    blocks = adapters(m, b, d, 2, torch.float64).requires_grad_()
    index = torch.tensor([1, -1, 0, 1])

    def function(x, blocks):
        return butterfly_matmul_indexed(x, blocks, index, transpose=transpose)

    assert torch.autograd.gradcheck(function, (x, blocks))
    assert torch.autograd.gradgradcheck(function, (x, blocks), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(backend, dtype):
    """In halves as good as butterfly_matmul in the same dtype, against float64."""
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the CPU kernels have no float16")
    x, blocks = torch.randn(30, 64).to(dtype), adapters(2, 8, 64, dtype=torch.float64)
    index = torch.randint(-1, 3, (30,))
    got = butterfly_matmul_indexed(x, blocks.to(torch.promote_types(dtype, torch.float32)), index)
    assert got.dtype == dtype
    truth = one_by_one(x.double(), blocks, index)
    with backends.force("reference"):
        plain = one_by_one(x, blocks.float() if dtype != torch.float64 else blocks, index)
    error, allowed = ((t.double() - truth).abs().max() for t in (got, plain))
    assert error <= 2 * allowed + 1e-6


def test_the_triton_kernel_over_tiles_of_rows(monkeypatch):
    """More rows than a tile, several tiles in a program, all adapters in one tile, odd groups."""
    if not backends.has_triton():
        pytest.skip("triton is not installed")
    from boft_ops.triton_kernels import rotate_indexed as kernels
    from boft_ops.triton_kernels.limits import H200

    small = H200._replace(multiprocessors=1, threads=32)  # one program at a time
    monkeypatch.setattr(kernels, "limits_of", lambda device: small)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for size, chunk, stride, groups in ((4, 2, 4, 8), (3, 3, 1, 7), (32, 8, 4, 4), (64, 64, 1, 1)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(150, size * groups, device=device).to(dtype)
            stages = torch.linalg.qr(torch.randn(6, groups, size, size, device=device))[0]
            index = torch.randint(-2, 8, (150,), device=device, dtype=torch.int32)
            index[:90] = index[:90].sort().values
            args = (chunk, stride, False)
            got = kernels.rotate_indexed(x, stages, index, *args)
            exact = rotate_indexed._rotate_indexed(x.double(), stages.double(), index, *args)
            plain = rotate_indexed._rotate_indexed(x, stages, index, *args)
            assert torch.equal(got.isnan(), exact.isnan())
            assert torch.equal(got[index == -1], x[index == -1])
            errors = [(t.double() - exact).nan_to_num().abs().max() for t in (got, plain)]
            assert errors[0] <= 2 * errors[1] + 1e-6


def test_the_triton_gradient_over_tiles_of_rows():
    """Several tiles in a segment, splits without a row, offsets that are cut, odd groups."""
    if not backends.has_triton():
        pytest.skip("triton is not installed")
    from boft_ops.triton_kernels import segment_stage_grads as kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ends = torch.tensor([0, 90, 91, 91, 40, 149, 2**31 - 1, -3], device=device).int()
    for size, chunk, stride, groups in ((3, 3, 1, 7), (32, 8, 4, 4), (96, 96, 1, 1)):
        for dtype in (torch.float32, torch.bfloat16):
            x, grad = torch.randn(2, 150, size * groups, device=device).to(dtype)
            args = ends, size, chunk, stride, 2
            got = kernels.segment_stage_grads(x, grad, *args)
            exact = segment_stage_grads_reference(x.double(), grad.double(), *args)
            assert got.shape == exact.shape
            assert got.dtype == torch.promote_types(dtype, torch.float32)
            bound = 16 * torch.finfo(got.dtype).eps * exact.abs().max()
            assert (got.double().sum(0) - exact.sum(0)).abs().max() <= bound


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("m", "b", "d"), [*SHAPES[1:3], SHAPES[-1]])
def test_segments(small, m, b, d, transpose):
    """An empty segment, one of one row, rows in none, and the gradients of all."""
    x, blocks = torch.randn(12, d), adapters(m, b, d, 4)
    offsets, index = torch.tensor([5, 5, 6, 10]), torch.tensor([0] * 5 + [2] + [3] * 4 + [-1] * 2)
    leaves, upstream = (x.requires_grad_(), blocks.requires_grad_()), torch.randn(d, 12).T
    got = butterfly_matmul_segments(*leaves, offsets, transpose=transpose)
    want = one_by_one(*leaves, index, transpose)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[10:], x[10:])
    grads = [torch.autograd.grad(y, leaves, upstream) for y in (got, want)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (grads[0][1][1] == 0).all()


def test_one_pass_however_many_adapters(monkeypatch):
    """The gradient calls its kernel once for each stage, and no kernel for each adapter."""
    calls = []
    kernel = rotate_indexed.segment_stage_grads
    monkeypatch.setattr(
        rotate_indexed, "segment_stage_grads", lambda *args: calls.append(1) or kernel(*args)
    )
    for n in (2, 60):
        x, blocks = torch.randn(30, 32), adapters(2, 8, 32, n).requires_grad_()
        for index in (torch.randint(-1, n, (30,)), torch.arange(30) * n // 30):
            calls.clear()
            butterfly_matmul_indexed(x, blocks, index).sum().backward()
            assert len(calls) == 1


def test_gradcheck_of_segments():
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    blocks = adapters(2, 4, 8, 3, torch.float64).requires_grad_()
    offsets = torch.tensor([2, 2, 4])

    def function(x, blocks):
        return butterfly_matmul_segments(x, blocks, offsets)

    assert torch.autograd.gradcheck(function, (x, blocks))
    assert torch.autograd.gradgradcheck(function, (x, blocks), fast_mode=True)


def test_segments_are_compiled_once_for_any_offsets():
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(butterfly_matmul_segments, fullgraph=True, backend=counter)
    x, blocks = torch.randn(6, 16), adapters(2, 4, 16).requires_grad_()
    for ends in ([2, 2, 6], [0, 0, 0], [1, 4, 5]):
        offsets = torch.tensor(ends)
        got, want = (f(x, blocks, offsets) for f in (compiled, butterfly_matmul_segments))
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(y.square().sum(), blocks)[0] for y in (got, want)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("x", "offsets", "error", "match"),
    [
        ((2, 3, 16), [1, 2, 2], ValueError, r"x: expected rows \(N, d\), got shape \(2, 3, 16\)"),
        ((6, 16), [1, 2], ValueError, r"offsets: expected an end for each of 3 segments, got"),
        ((6, 16), [1, 7, 7], ValueError, r"ascending ends up to 6, got \[1, 7, 7\]"),
        ((6, 16), [3, 2, 5], ValueError, r"ascending ends up to 6, got \[3, 2, 5\]"),
        ((6, 16), [-1, 2, 5], ValueError, "ascending ends up to 6"),
        (
            (6, 16),
            [1.0, 2.0, 5.0],
            TypeError,
            "offsets: expected a tensor of integers, got torch.f",
        ),
    ],
)
def test_bad_segments(x, offsets, error, match):
    with pytest.raises(error, match=match):
        butterfly_matmul_segments(torch.zeros(x), BLOCKS, torch.tensor(offsets))


def test_leading_dimensions_and_broadcast_indices():
    x, blocks = torch.randn(4, 5, 16), adapters(2, 4, 16)
    index = torch.tensor([1, -1, 0, 2])
    got = butterfly_matmul_indexed(x, blocks, index[:, None])
    for i, a in enumerate(index.tolist()):
        want = x[i] if a < 0 else butterfly_matmul(x[i], blocks[a])
        torch.testing.assert_close(got[i], want)
    one = butterfly_matmul_indexed(x, blocks, torch.tensor(2, dtype=torch.uint8))
    torch.testing.assert_close(one, butterfly_matmul(x, blocks[2]))
    empty = butterfly_matmul_indexed(x[:0], blocks, torch.zeros(0, 1, dtype=torch.int64))
    assert empty.shape == (0, 5, 16)


def test_vmap_over_requests():
    x, blocks = torch.randn(3, 4, 16), adapters(2, 4, 16)
    index = torch.tensor([[0, 1, 2, -1]] * 3)
    got = vmap(lambda x: butterfly_matmul_indexed(x, blocks, index[0]))(x)
    torch.testing.assert_close(got, butterfly_matmul_indexed(x, blocks, index))


def test_compiled_once_for_any_index():
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(butterfly_matmul_indexed, fullgraph=True, backend=counter)
    x, blocks = torch.randn(6, 16), adapters(2, 4, 16)
    for _ in range(3):
        index = torch.randint(-1, 3, (6,))
        torch.testing.assert_close(compiled(x, blocks, index), one_by_one(x, blocks, index))
    assert counter.frame_count == 1
    # out of range there, where a look at the index would break the graph: loud, not wrong
    bad = compiled(x, blocks, torch.tensor([0, 3, -2, 1, -1, 2]))
    assert bad.isnan().any(1).tolist() == [False, True, True, False, False, False]
    # nor is what would be in range modulo 2**32
    bad = compiled(x, blocks, torch.tensor([0, 2**32 + 1, 2**32 - 1, 1, -(2**32), 2**63 - 1]))
    assert bad.isnan().any(1).tolist() == [False, True, True, False, True, True]


def test_the_benchmark_times_what_it_says(capsys, monkeypatch):
    from bench_modules import indexed as bench

    one, ours, loop, clone = bench.contest(3, 20, 4, torch.device("cpu"))
    assert torch.equal(ours.run()[:4], one.run()[:4])  # rows of the first adapter
    torch.testing.assert_close(ours.run(), loop.run(), rtol=1e-5, atol=1e-5)
    assert (ours.run() - clone.run()).abs().max() > 0.01
    _, ours, slices, masks = (
        one.run() for one in bench.gradient_contest(3, 20, torch.device("cpu"))
    )
    torch.testing.assert_close(ours, slices, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, masks, rtol=1e-4, atol=1e-4)
    assert len(ours.unique(dim=0)) == 3
    monkeypatch.setattr(bench, "CASES", [(3, 20, 4)])
    monkeypatch.setattr(bench, "GRADIENT_CASES", [(3, 20)])
    monkeypatch.setattr("sys.argv", ["rotate_indexed.py", "--dry-run", "--seconds", "0.01"])
    bench.main()
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[3] for row in rows] == [*bench.NAMES, *bench.GRADIENT_NAMES]
    assert all(float(row[5]) > 0 for row in rows)


BLOCKS = torch.zeros(3, 2, 4, 4, 4)


@pytest.mark.parametrize(
    ("x", "blocks", "index", "error", "match"),
    [
        (torch.zeros(2, 16), BLOCKS[0], torch.tensor([0, 0]), ValueError, "blocks: expected shap"),
        (torch.zeros(2, 8), BLOCKS, torch.zeros(2).long(), ValueError, "x: expected a last dim"),
        (torch.zeros(2, 16), BLOCKS, torch.zeros(3).long(), ValueError, "broadcasts to"),
        (torch.zeros(2, 16), BLOCKS, torch.zeros(2), TypeError, "index: expected a tensor of int"),
        (torch.zeros(2, 16), BLOCKS, torch.zeros(2).bool(), TypeError, "index: expected a tensor"),
        (torch.zeros(2, 16), BLOCKS, [0, 1], TypeError, "index: expected a tensor of int"),
        (torch.zeros(2, 16), BLOCKS, torch.tensor([0, 3]), ValueError, r"in \[-1, 2\], got 0 to 3"),
        (torch.zeros(2, 16), BLOCKS, torch.tensor([-2, 0]), ValueError, "got -2 to 0"),
        (torch.zeros(2, 16).long(), BLOCKS, torch.tensor([0, 0]), TypeError, "x: expected a dtype"),
        (torch.zeros(2, 12), torch.zeros(3, 2, 3, 4, 4), torch.zeros(2).long(), ValueError,
         "Nearest valid"),
    ],
)  # fmt: skip
def test_bad_arguments(x, blocks, index, error, match):
    with pytest.raises(error, match=match):
        butterfly_matmul_indexed(x, blocks, index)
