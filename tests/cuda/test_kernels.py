"""The CUDA kernels, through their bindings, against the ops' references; truth is in float64.

On a GPU where there is one with the native library's CUDA kernels; and everywhere emulated on the
CPU (tests/cuda/emulation.h), one test after the other in one of three orders of threads.
tests/cuda/test_mutations.py shows that kernels without one of their barriers fail.
"""

import itertools
import os
import shutil
import sys
from pathlib import Path

import cuda_emulation
import pytest
import torch

from boft_ops._runtime import backend, native
from boft_ops.ops.cayley import cayley_backward_reference, cayley_reference
from boft_ops.ops.compose import compose_backward_reference, compose_reference
from boft_ops.ops.linear_from_skew import linear_from_skew_backward, linear_from_skew_forward
from boft_ops.ops.rotate import rotate_backward_reference, rotate_reference
from boft_ops.ops.rotate_indexed import _rotate_indexed
from boft_ops.ops.rotated_linear import rotated_linear_backward_reference, rotated_linear_reference
from boft_ops.ops.scale import scale_backward_reference, scale_reference
from boft_ops.ops.segment_stage_grads import segment_stage_grads_reference

ORDERS = ("forward", "reverse", "scattered")
NONE = None, None, 0, None  # a drop_mask, a scale, its base and a bias
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ATOL = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-6, torch.float16: 1e-6}


class OnDevice:
    """The CUDA operators of the native library, for tensors that come from the CPU."""

    def __getattr__(self, name):
        op = backend.ops()[name].native()

        def call(*arguments):
            moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
            out = op(*moved)
            return tuple(t.cpu() for t in out) if isinstance(out, tuple) else out.cpu()

        return call


@pytest.fixture(scope="module", params=["emulated", pytest.param("device", marks=pytest.mark.gpu)])
def cuda(request):
    """The operators; a library built beforehand is that of BOFT_EMULATED_LIBRARY."""
    if request.param == "device":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        assert native.kernels("cuda"), native.status
        return OnDevice()
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("emulated with GCC on Linux")
    built = os.environ.get("BOFT_EMULATED_LIBRARY")
    if built is None:
        built = cuda_emulation.build_once() / cuda_emulation.LIB
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


def shifted(tensor):
    """Copy a tensor to memory that begins one number earlier."""
    storage = tensor.new_empty(tensor.numel() + 1)
    return storage[1:].view(tensor.shape).copy_(tensor)


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
    check(blocks, cayley_reference(skew, mask), cayley_reference(skew.double(), mask))
    grad = torch.randn(*shape, b, b).to(dtype)
    skew_grad = cuda.cayley_backward(blocks, mask, grad)
    truth = cayley_backward_reference(blocks.double(), mask, grad.double())
    check(skew_grad, cayley_backward_reference(blocks, mask, grad), truth, scale=1.0)
    if mask is not None:
        assert torch.equal(blocks[mask], torch.eye(b, dtype=dtype).expand_as(blocks[mask]))
        assert not skew_grad[mask].any()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e2, 1e6])
def test_cayley_of_any_size_of_angle(cuda, scale):
    skew = torch.randn(40, 28) * scale
    check(cuda.cayley(skew, None), cayley_reference(skew), cayley_reference(skew.double()))


def test_cayley_of_nothing_and_of_strided_operands(cuda):
    assert cuda.cayley(torch.randn(0, 28), None).shape == (0, 8, 8)
    assert cuda.cayley_backward(torch.randn(0, 8, 8), None, torch.randn(0, 8, 8)).shape == (0, 28)
    skew, drop = torch.randn(2, 28, 9).mT, dropout("some", 9, 2).T
    blocks = cuda.cayley(skew, drop)
    assert torch.equal(blocks, cuda.cayley(skew.contiguous(), drop.contiguous()))
    grad = torch.randn_like(blocks).mT
    got = cuda.cayley_backward(blocks, drop, grad)
    assert torch.equal(got, cuda.cayley_backward(blocks, drop, grad.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [2, 4, 8])
def test_cayley_of_operands_that_vectors_do_not_fit(cuda, b, dtype):
    """Views that begin one number after the beginning of their memory."""
    skew, grad = torch.randn(70, b * (b - 1) // 2).to(dtype), torch.randn(70, b, b).to(dtype)
    blocks = cuda.cayley(skew, None)
    assert torch.equal(blocks, cuda.cayley(shifted(skew), None))
    got = cuda.cayley_backward(shifted(blocks), None, shifted(grad))
    assert torch.equal(got, cuda.cayley_backward(blocks, None, grad))


# size, chunk, stride, number of groups, rows, transpose
STRUCTURES = [
    (1, 1, 1, 5, 5, False),
    (2, 1, 2, 22, 67, True),
    (3, 3, 1, 23, 67, False),  # five groups in a band of 16, the last tile half empty
    (4, 2, 4, 24, 5, False),
    (6, 3, 2, 10, 5, True),
    (6, 6, 1, 20, 200, True),  # halves: pieces of four groups, in three vectors of four
    (8, 4, 2, 18, 67, False),
    (8, 8, 1, 7, 300, False),  # the last piece has three groups of four
    (12, 6, 4, 8, 5, True),
    (15, 15, 1, 3, 5, True),
    (16, 16, 1, 5, 67, True),
    (16, 4, 8, 16, 5, False),
    (16, 8, 4, 8, 150, True),
    (20, 10, 2, 2, 5, False),
    (20, 20, 1, 4, 67, True),
    (24, 24, 1, 2, 5, True),
    (32, 32, 1, 3, 67, True),
    (32, 4, 8, 8, 5, False),
    (43, 43, 1, 2, 5, True),
    (48, 12, 2, 2, 5, False),
    (48, 16, 2, 4, 67, True),
    (64, 64, 1, 2, 5, False),
    (64, 8, 2, 2, 131, True),
    (64, 4, 4, 4, 5, True),
    (96, 48, 2, 2, 5, False),
    (128, 16, 2, 2, 67, True),
    (160, 80, 1, 1, 5, False),
    (256, 128, 1, 1, 5, True),
]


def check_rotate(cuda, size, chunk, stride, n_groups, rows, transpose, dtype, splits=2):
    exact = torch.promote_types(dtype, torch.float32)
    x, grad = torch.randn(2, rows, size * n_groups, dtype=exact).to(dtype)
    skew = 0.3 * torch.randn(n_groups, size, size, dtype=torch.float64) / size**0.5
    stage = torch.matrix_exp(skew - skew.mT).to(exact)  # orthogonal, near the identity
    layout = chunk, stride
    truth = [t.double() for t in (grad, x, stage)]
    y = cuda.rotate(x, stage, *layout, transpose)
    check(
        y,
        rotate_reference(x, stage, *layout, transpose),
        rotate_reference(truth[1], truth[2], *layout, transpose),
    )
    factor = torch.randn(rows, dtype=exact)
    check(
        cuda.rotate(x, stage, *layout, transpose, factor),
        rotate_reference(x, stage, *layout, transpose, factor),
        rotate_reference(truth[1], truth[2], *layout, transpose, factor.double()),
    )
    x_grad, gram = cuda.rotate_backward(grad, x, stage, *layout, transpose, splits)
    want, sums = rotate_backward_reference(grad, x, stage, *layout, transpose, 1)
    exact_grad, exact_sums = rotate_backward_reference(*truth, *layout, transpose, 1)
    check(x_grad, want, exact_grad)
    assert gram.shape == (splits, *sums.shape[1:])
    # the reference of halves sums in them
    check(gram.sum(0), sums[0].double().to(gram.dtype), exact_sums[0])
    pair = (grad, x) if transpose else (x, grad)
    alone = cuda.rotate_stage_grad(*pair, size, *layout, splits)
    torch.testing.assert_close(alone, gram, rtol=1e-5, atol=1e-5 * rows)
    if splits == 1:
        bound = 8 * torch.finfo(gram.dtype).eps * rows**0.5 * exact_sums.abs().max()
        assert (gram.double() - exact_sums).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: "-".join(map(str, s)))
def test_rotate(cuda, structure, dtype):
    check_rotate(cuda, *structure, dtype)


@pytest.mark.exhaustive_if(condition=lambda rows, **_: rows > 500)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("stride", "n_groups", "rows", "transpose", "splits"),
    [
        (8, 8, 0, True, 2),
        (8, 8, 1, False, 1),
        (8, 16, 70, True, 3),
        (16, 16, 32, False, 1),
        (8, 8, 260, True, 1),  # two ranges of rows in one split
        (8, 8, 530, False, 2),
    ],
)
def test_rotate_of_eight_neighboring_groups(cuda, stride, n_groups, rows, transpose, splits, dtype):
    """One range of rows and several, whose last rows do not fill a strip."""
    check_rotate(cuda, 64, 4, stride, n_groups, rows, transpose, dtype, splits)
    x, grad = torch.randn(2, rows, 64 * n_groups).to(dtype)
    stage = torch.randn(n_groups, 64, 64) / 8
    more = stage, 4, stride, transpose
    results = cuda.rotate(x, *more), *cuda.rotate_backward(grad, x, *more, splits)
    # the kernels for any stage, in the place of those for aligned rows
    x, grad = shifted(x), shifted(grad)
    others = cuda.rotate(x, *more), *cuda.rotate_backward(grad, x, *more, splits)
    for got, other in zip(results[:2], others[:2], strict=True):
        torch.testing.assert_close(got, other, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(results[2].sum(0), others[2].sum(0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("transpose", [False, True])
def test_gram_matrices_of_neighboring_groups(cuda, transpose):
    """Each has the sums of its own group, also beside one with numbers that are not finite."""
    x, grad = torch.zeros(2, 5, 1024).bfloat16()
    x[:, 8 * 4 + 5], grad[:, 8 * 4 + 7] = 1, 2  # features 5 and 7 of group 1, in its chunk 1
    x[:, 3] = grad[:, 3] = float("inf")  # feature 3 of group 0
    stage = torch.eye(64).expand(16, 64, 64).contiguous()
    x_grad, gram = cuda.rotate_backward(grad, x, stage, 4, 8, transpose, 1)
    want = torch.zeros(16, 64, 64)
    at = (7, 5) if transpose else (5, 7)
    want[1][at] = 5 * 2
    assert torch.equal(gram[0, 1:], want[1:])
    finite = [t.view(5, 2, 16, 8, 4)[:, :, :, 1:] for t in (x_grad, grad)]
    assert torch.equal(*finite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 63, 64, 65, 200])
def test_every_number_of_rows(cuda, rows, dtype):
    check_rotate(cuda, 16, 16, 1, 6, rows, rows % 2 == 0, dtype, splits=1 + rows % 3)


def check_rotate_indexed(cuda, size, chunk, stride, n_groups, index, n_adapters, transpose, dtype):
    exact = torch.promote_types(dtype, torch.float32)
    x = torch.randn(len(index), size * n_groups, dtype=exact).to(dtype)
    skew = 0.3 * torch.randn(n_adapters, n_groups, size, size, dtype=torch.float64) / size**0.5
    stages = torch.matrix_exp(skew - skew.mT).to(exact)
    index = torch.tensor(index, dtype=torch.int32)
    more = index, chunk, stride, transpose
    got = cuda.rotate_indexed(x, stages, *more)
    want = _rotate_indexed(x, stages, *more)
    valid = (index >= -1) & (index < n_adapters)
    truth = _rotate_indexed(x.double(), stages.double(), *more)
    check(got[valid], want[valid], truth[valid])
    assert torch.equal(got[index == -1], x[index == -1])
    assert got[~valid].isnan().all()
    assert got.shape == want.shape


INDICES = {
    "mixed": [2, 0, -1, 1, 1, 2, 0] * 11,
    "neighbours": [1] * 70 + [2] * 40 + [-1] * 20 + [0] * 17,
    "one": [2] * 33,
    "none": [-1] * 19,
    "out of range": [0, 3, 1, -2, 2**31 - 1, -(2**31), 2, -1],
    "a row": [1],
    "no row": [],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", INDICES)
def test_rotate_indexed(cuda, index, dtype):
    check_rotate_indexed(cuda, 8, 4, 2, 6, INDICES[index], 3, len(index) % 2 == 0, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "structure",
    [
        *[(1, 1, 1, 5), (3, 3, 1, 23), (16, 4, 8, 16), (20, 10, 2, 2), (43, 43, 1, 2)],
        *[(64, 4, 4, 4), (160, 80, 1, 1), (256, 128, 1, 1)],
    ],
    ids=lambda s: "-".join(map(str, s)),
)
def test_rotate_indexed_of_any_structure(cuda, structure, dtype):
    check_rotate_indexed(cuda, *structure, [0, 1, -1, 1, 5, 0, 1], 2, structure[0] % 2 == 0, dtype)


def check_segments(cuda, size, chunk, stride, n_groups, rows, ends, dtype, splits):
    exact = torch.promote_types(dtype, torch.float32)
    x, grad = torch.randn(2, rows, size * n_groups, dtype=exact).to(dtype)
    more = torch.tensor(ends, dtype=torch.int32), size, chunk, stride
    got = cuda.segment_stage_grads(x, grad, *more, splits)
    want = segment_stage_grads_reference(x, grad, *more, splits).sum(0)
    truth = segment_stage_grads_reference(x.double(), grad.double(), *more, 1)[0]
    assert got.shape == (splits, *want.shape)
    check(got.sum(0), want, truth)
    empty = torch.diff(more[0], prepend=torch.zeros(1, dtype=torch.int32)) <= 0
    assert not got[:, empty].any()


ENDS = {
    "sorted": (200, [70, 70, 71, 199]),  # an empty segment, one of one row, a row in none
    "no row": (0, [0, 0]),
    "no segment": (5, []),
    "cut": (90, [80, 20, 2**31 - 1, -7, 60]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", ENDS)
def test_segment_stage_grads(cuda, ends, dtype):
    check_segments(cuda, 8, 4, 2, 6, *ENDS[ends], dtype, splits=1 + len(ends) % 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "structure",
    [(3, 3, 1, 23), (16, 4, 8, 16), (43, 43, 1, 2), (64, 4, 4, 4), (160, 80, 1, 1)],
    ids=lambda s: "-".join(map(str, s)),
)
def test_segment_stage_grads_of_any_structure(cuda, structure, dtype):
    check_segments(cuda, *structure, 24, [0, 17, 18, 23], dtype, splits=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["rotate", "rotate_backward"])
def test_rows_that_begin_anywhere(cuda, name, dtype):
    """Contiguous, but no multiple of 16 bytes from where memory was allocated."""
    memory = torch.randn(2, 1 + 37 * 48).to(dtype)
    grad, x = (part[1:].view(37, 48) for part in memory)
    stage = torch.randn(3, 16, 16, dtype=torch.promote_types(dtype, torch.float32)) / 4
    more = (2,) if name == "rotate_backward" else ()
    rows = (grad, x) if name == "rotate_backward" else (x,)
    got = getattr(cuda, name)(*rows, stage, 8, 1, False, *more)
    want = getattr(cuda, name)(*[t.clone() for t in rows], stage, 8, 1, False, *more)
    torch.testing.assert_close(got, want)


STAGES = [
    *[(1, 2, 0), (1, 3, 0), (1, 8, 0), (2, 8, 0), (2, 6, 2), (3, 4, 1), (4, 4, 0), (1, 64, 0)],
    *[(2, 32, 0), (6, 2, 1), (2, 8, 3)],
]


def check_compose(cuda, n, b, first, dtype, splits):
    """Factors that are not orthogonal, and several runs of 2^first groups."""
    size, runs = b << (n - 1), 3 if b << n <= 64 else 1
    factors = torch.randn(n, runs << (n - 1 + first), b, b, dtype=dtype)
    check(
        cuda.compose(factors, first),
        compose_reference(factors, first),
        compose_reference(factors.double(), first),
    )
    grad = torch.randn(splits, factors.shape[1] * b // size, size, size, dtype=dtype)
    check(
        cuda.compose_backward(factors, grad, first),
        compose_backward_reference(factors, grad, first),
        compose_backward_reference(factors.double(), grad.double(), first),
    )


@pytest.mark.parametrize(("n", "b", "first"), STAGES)
def test_compose(cuda, n, b, first):
    check_compose(cuda, n, b, first, torch.float32, splits=1 + b % 3)
    check_compose(cuda, n, b, first, torch.float64, splits=1)


@pytest.mark.parametrize(("n", "b"), [(5, 8), (6, 8), (3, 64), (8, 2)])
def test_compose_in_several_slabs(cuda, n, b):
    check_compose(cuda, n, b, 0, torch.float32, splits=1)


def check_stage_from_skew(cuda, m, b, n_groups, dtype, drop, splits):
    n_blocks, size = n_groups << (m - 1), b << (m - 1)
    mask = dropout(drop, m, n_blocks)
    skew = torch.randn(m, n_blocks, b * (b - 1) // 2, dtype=dtype) / b**0.5
    blocks, stage = cuda.stage_from_skew(skew, mask)
    assert torch.equal(blocks, cuda.cayley(skew, mask))
    truth = cayley_reference(skew.double(), mask)
    check(stage, compose_reference(cayley_reference(skew, mask), 0), compose_reference(truth, 0))
    grad = torch.randn(splits, n_groups, size, size, dtype=dtype)

    def backward(blocks, grad):
        return cayley_backward_reference(blocks, mask, compose_backward_reference(blocks, grad, 0))

    got = cuda.stage_from_skew_backward(blocks, mask, grad)
    check(got, backward(blocks, grad), backward(blocks.double(), grad.double()), scale=1.0)
    if mask is not None:
        assert not got[mask].any()


@pytest.mark.parametrize("drop", ["none", "some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("m", "b"), [(1, 3), (1, 64), (2, 8), (2, 6), (3, 4), (4, 4), (2, 32), (6, 2), (4, 8)]
)
def test_stage_from_skew(cuda, m, b, dtype, drop):
    n_groups = 7 if b << (m - 1) <= 16 else 2
    check_stage_from_skew(cuda, m, b, n_groups, dtype, drop, splits=1 + b % 4 // 2)


SMALL = [(m, b) for b in (2, 4, 8) for m in range(1, 7) if b << (m - 1) <= 64]


@pytest.mark.parametrize(("m", "b"), SMALL)
def test_stage_of_small_blocks(cuda, m, b):
    """One group, and several blocks of threads of which the last has the fewest groups."""
    for n_groups, drop, splits in [(1, "none", 1), (35, "some", 3)]:
        check_stage_from_skew(cuda, m, b, n_groups, torch.float32, drop, splits)


@pytest.mark.parametrize(("m", "b"), [(1, 2), (2, 2), (3, 4), (2, 8)])
def test_stage_of_operands_that_vectors_do_not_fit(cuda, m, b):
    """Views that begin one number after the beginning of their memory."""
    skew = torch.randn(m, 9 << (m - 1), b * (b - 1) // 2)
    blocks, stage = cuda.stage_from_skew(skew, None)
    for got, want in zip(cuda.stage_from_skew(shifted(skew), None), (blocks, stage), strict=True):
        assert torch.equal(got, want)
    grad = torch.randn(5, *stage.shape)
    got = cuda.stage_from_skew_backward(shifted(blocks), None, shifted(grad))
    assert torch.equal(got, cuda.stage_from_skew_backward(blocks, None, grad))


def test_stage_of_no_blocks(cuda):
    with pytest.raises(RuntimeError, match="not a butterfly"):
        cuda.stage_from_skew(torch.zeros(2, 0, 28), None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n"), [(0, 8), (1, 1), (70, 37), (33, 1040), (5, 0)])
def test_scale(cuda, rows, n, dtype):
    exact = torch.promote_types(dtype, torch.float32)
    grad, x = torch.randn(2, rows, n, dtype=exact).to(dtype)
    scale, center = torch.randn(2, n, dtype=exact)
    bias = torch.randn(n).to(dtype)  # vectors but the scale may be as narrow as the rows
    for vectors in [(None, None), (center, center), (bias, bias), (None, bias)]:
        wide = [None if v is None else v.double() for v in vectors]
        truth = scale_reference(x.double(), scale.double(), *wide)
        check(cuda.scale(x, scale, *vectors), scale_reference(x, scale, *vectors), truth)
    assert torch.equal(cuda.scale(x, torch.ones_like(scale), bias, bias), x)
    for middle in (None, center, bias):
        got = cuda.scale_backward(grad, x, scale, middle)
        truth = [None if t is None else t.double() for t in (grad, x, scale, middle)]
        wanted = scale_backward_reference(grad, x, scale, middle), scale_backward_reference(*truth)
        for ours, want, real in zip(got, *wanted, strict=True):
            check(ours, want, real)
        none, *sums = cuda.scale_backward(grad, x, None, middle)
        assert none.shape == (0, n)
        assert all(map(torch.equal, sums, got[1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "bias_in_z"),
    [("unscaled", True), *itertools.product(["scaled", "trained"], [True, False])],
)
def test_rotated_linear(cuda, kind, bias_in_z, with_bias, dtype):
    """One call makes the launches of a layer, each of which has a test of its own."""
    x, grad = torch.randn(40, 48).to(dtype), torch.randn(40, 24).to(dtype)
    weight = (torch.randn(24, 48) / 48**0.5).to(dtype)
    skew = 0.1 * torch.randn(3, 16, 16)
    stage = torch.matrix_exp(skew - skew.mT)
    scale = None if kind == "unscaled" else 1 + 0.1 * torch.randn(24)
    bias = torch.randn(24).to(dtype) if with_bias else None
    arguments = x, weight, stage, scale, bias, bias_in_z, kind == "trained"
    center = bias if bias_in_z else None
    exact = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    y, z = cuda.rotated_linear(*arguments)
    want, z_want = rotated_linear_reference(*arguments)
    y_exact, z_exact = rotated_linear_reference(*exact)
    assert z.shape == z_want.shape
    check(y, want, y_exact)
    check(z, z_want, z_exact)
    z, z_exact = (z, z_exact) if kind == "trained" else (None, None)
    got = cuda.rotated_linear_backward(grad, x, weight, stage, scale, center, z, 2, False)
    backward = rotated_linear_backward_reference
    wanted = backward(grad, x, weight, stage, scale, center, z, 2, False)
    wide = None if center is None else center.double()
    truth = backward(grad.double(), *exact[:4], wide, z_exact, 2, False)
    for i, (ours, reference, real) in enumerate(zip(got, wanted, truth, strict=True)):
        parts = i == 1  # summed up: how they are divided is the kernel's affair
        check(*(t.sum(0) if parts else t for t in (ours, reference, real)), scale=1e4 * parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", ["unscaled", "scaled", "trained"])
def test_linear_from_skew(cuda, kind, with_bias, dtype):
    """All launches of a layer from the skew on, for x of any number of dimensions."""
    x, grad = torch.randn(2, 20, 32).to(dtype), torch.randn(2, 20, 24).to(dtype)
    weight, skew = (torch.randn(24, 32) / 32**0.5).to(dtype), 0.3 * torch.randn(2, 4, 28)
    drop = torch.rand(2, 4) < 0.3
    base = int(kind == "trained")  # the scale is stored as an offset from it
    scale = None if kind == "unscaled" else 1 - base + 0.1 * torch.randn(24)
    bias = torch.randn(24).to(dtype) if with_bias else None
    arguments = x, weight, skew, drop, scale, base, bias, kind == "trained", False
    exact = [a.double() if _is_floating(a) else a for a in arguments]
    y, z, rotation = cuda.linear_from_skew(*arguments)
    wanted, truth = linear_from_skew_forward.reference, linear_from_skew_forward.reference(*exact)
    if dtype != torch.float32 and scale is not None and bias is not None:
        truth = truth[0], truth[1] - (bias.double() if len(z) else 0), truth[2]
    for ours, reference, real in zip((y, z, rotation), wanted(*arguments), truth, strict=True):
        check(ours, reference, real)
    z = z if kind == "trained" else None
    need_bias = z is not None
    call = x, weight, skew, rotation, drop, scale, base, bias, z, False, 2, need_bias, False
    got = cuda.linear_from_skew_backward(grad, *call)
    backward = linear_from_skew_backward.reference
    exact = [a.double() if _is_floating(a) else a for a in (grad, *call)]
    if dtype != torch.float32 and scale is not None and bias is not None and z is not None:
        exact[9] = exact[9] + bias.double()  # in float64 the bias is in z
    wanted, truth = backward(grad, *call), backward(*exact)
    for ours, reference, real in zip(got, wanted, truth, strict=True):
        check(ours, reference, real, scale=10)


def _is_floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


INDEXED = torch.zeros(3, 16), torch.zeros(4, 2, 8, 8), torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("cayley", (torch.zeros(2, 4), None), r"b\(b-1\)/2"),
        ("cayley", (torch.zeros(2, 2080), None), "at most 64, got 65"),
        ("cayley", (torch.zeros(2, 6), torch.zeros(3, dtype=torch.bool)), "boolean for each"),
        ("cayley", (torch.zeros(2, 6, dtype=torch.int32), None), "got another dtype"),
        ("cayley_backward", (torch.zeros(2, 3, 3), None, torch.zeros(1, 3, 3)), "shape and dtype"),
        ("compose", (torch.zeros(2, 3, 4, 4), 0), "not a butterfly"),
        ("compose", (torch.zeros(5, 16, 32, 32), 0), "at most 256 rows, got 512"),
        ("compose", (torch.zeros(2, 4, 4, 4).half(), 0), "float32 or float64"),
        ("compose_backward", (torch.zeros(2, 4, 4, 4), torch.zeros(0, 2, 8, 8), 0), "stage matri"),
        ("stage_from_skew", (torch.zeros(3, 6), None), "3 dimensions"),
        ("stage_from_skew", (torch.zeros(4, 8, 120), None), "at most 64 rows, got 128"),
        ("rotate", (torch.zeros(3, 12), torch.zeros(1, 8, 8), 4, 1, False), "does not fit"),
        ("rotate", (torch.zeros(3, 16), torch.zeros(2, 8, 8).double(), 4, 1, False), "dtype of x"),
        ("rotate", (torch.zeros(1, 512), torch.zeros(1, 512, 512), 4, 1, False), "at most 256"),
        (
            "rotate",
            (torch.zeros(3, 8), torch.zeros(2, 4, 4), 4, 1, False, torch.zeros(2)),
            r"factor: expected \(rows,\)",
        ),
        ("rotate_indexed", (*INDEXED[:2], torch.zeros(3), 4, 1, False), "int32 for each row"),
        ("rotate_indexed", (*INDEXED[:2], INDEXED[2][1:], 4, 1, False), "int32 for each row"),
        ("rotate_indexed", (INDEXED[0], INDEXED[1][:, 1:], INDEXED[2], 4, 1, False), "adapters, d"),
        (
            "rotate_stage_grad",
            (torch.zeros(3, 8), torch.zeros(3, 8), 8, 4, 1, 0),
            "positive number, got 0",
        ),
        (
            "rotate_stage_grad",
            (torch.zeros(3, 8), torch.zeros(3, 16), 8, 4, 1, 1),
            "shape and dtype of x",
        ),
        (
            "segment_stage_grads",
            (*[torch.zeros(3, 8)] * 2, torch.zeros(1), 8, 4, 1, 1),
            "int32 for each segment",
        ),
        (
            "segment_stage_grads",
            (torch.zeros(3, 8), torch.zeros(2, 8), torch.zeros(1).int(), 8, 4, 1, 1),
            "shape and dtype of x",
        ),
        (
            "segment_stage_grads",
            (*[torch.zeros(3, 8)] * 2, torch.zeros(1).int(), 8, 4, 1, 0),
            "positive number, got 0",
        ),
        ("scale_backward", (*[torch.zeros(3, 4)] * 2, *[torch.zeros(3)] * 2), r"expected \(n,\)"),
        ("scale", (torch.zeros(3, 4), torch.zeros(4), torch.zeros(4), None), "none without a bias"),
        ("scale", (torch.zeros(3, 4), torch.zeros(3), None, None), r"expected \(n,\)"),
        (
            "rotated_linear",
            (torch.zeros(3, 8), torch.zeros(4, 6), torch.zeros(1, 8, 8), None, None, True, False),
            "of one dtype",
        ),
        (
            "linear_from_skew",
            (torch.zeros(3, 8), torch.zeros(4, 6), torch.zeros(1, 2, 6), *NONE, False, False),
            "of one dtype",
        ),
        (
            "linear_from_skew",
            (torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(1, 3, 6), *NONE, False, False),
            "blocks for 8 features",
        ),
        (
            "linear_from_skew_backward",
            (
                *[torch.zeros(3, 4), torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(1, 2, 6)],
                *[torch.zeros(63), *NONE, None],
                False,
                1,
                False,
                False,
            ),
            "rotation: expected",
        ),
    ],
)
def test_raw_ops_check_their_arguments(cuda, name, arguments, match):
    """No shape may make a kernel read outside its tensors, whoever calls it."""
    with pytest.raises(RuntimeError, match=match):
        getattr(cuda, name)(*arguments)


def test_the_same_bits_in_every_order_of_threads(cuda, monkeypatch):
    """And in every run on a GPU: partial sums are added up in a fixed order, without atomics."""
    x, grad = torch.randn(2, 150, 64).bfloat16()
    skew = torch.randn(2, 8, 28)
    wide, wide_grad = torch.randn(2, 260, 512).bfloat16()
    apart = torch.randn(8, 64, 64)
    results = []
    for order in ORDERS:
        monkeypatch.setenv("BOFT_EMULATION_ORDER", order)
        blocks, stage = cuda.stage_from_skew(skew, None)
        x_grad, gram = cuda.rotate_backward(grad, x, stage, 4, 1, False, 2)
        sums = cuda.scale_backward(grad, x, torch.ones(64), torch.zeros(64))
        rows = cuda.rotate_indexed(x, stage[None], torch.zeros(150, dtype=torch.int32), 4, 1, False)
        ends = torch.tensor([90, 150], dtype=torch.int32)
        more = x_grad, rows, cuda.segment_stage_grads(x, grad, ends, 16, 4, 1, 2), *sums
        more = *more, *cuda.rotate_backward(wide_grad, wide, apart, 4, 8, False, 1)
        results.append([blocks, cuda.stage_from_skew_backward(blocks, None, gram), *more])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
