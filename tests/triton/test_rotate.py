"""Triton kernels of rotate and its gradients against the references; float64 is the truth.

They run on a GPU if there is one, else in Triton's interpreter. That takes milliseconds per program
and most for the many small tiles of float32 and float64, so the grid is thinned. Every structure
meets one dtype, and in the exhaustive tests every dtype, with one number of rows and one direction.
Numbers of rows, splits and directions vary in full on two structures: one that packs groups into
bands and one in two dimensions.
"""

import pytest
import torch

from boft_ops._runtime import backend
from boft_ops.ops import rotate

if not backend.has_triton():
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from triton_cases import TABLES, reachable_tiles

from boft_ops.ops.rotate_indexed import rotate_indexed_rows
from boft_ops.ops.segment_stage_grads import segment_stage_grads
from boft_ops.triton_kernels import config_rotate
from boft_ops.triton_kernels import rotate as kernels
from boft_ops.triton_kernels import rotate_backward as backward_kernels
from boft_ops.triton_kernels.groups import positions
from boft_ops.triton_kernels.limits import H200

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# size, chunk, stride, number of groups, rows, transpose
STRUCTURES = [
    (1, 1, 1, 5, 5, False),
    (2, 1, 2, 22, 67, True),
    (3, 3, 1, 23, 67, False),  # five groups in a band of 16, the last program half empty
    (4, 2, 4, 24, 5, False),
    (6, 3, 2, 10, 5, True),
    (8, 4, 2, 10, 67, False),
    (12, 6, 4, 8, 5, True),
    (15, 15, 1, 3, 5, True),
    (16, 16, 1, 5, 67, True),
    (16, 4, 4, 8, 5, False),
    (20, 10, 2, 2, 5, False),
    (24, 24, 1, 2, 5, True),
    (32, 32, 1, 3, 67, True),
    (32, 8, 4, 8, 67, False),
    (43, 43, 1, 2, 5, True),
    (48, 12, 2, 2, 5, False),
    (64, 64, 1, 2, 5, False),
    (64, 4, 4, 4, 5, True),
    (96, 48, 2, 2, 5, False),
    (128, 16, 2, 2, 67, True),
    (160, 80, 1, 1, 5, False),
    (256, 128, 1, 1, 5, True),
]


def is_sampled(structure, dtype):
    """True for a diagonal of the grid: every structure once, every dtype in five or six of them."""
    return STRUCTURES.index(structure) % len(DTYPES) == DTYPES.index(dtype)


def inputs(size, n_groups, rows, dtype):
    """Random x and grad, and a stage of orthogonal matrices near the identity."""
    exact = dtype if dtype == torch.float64 else torch.float32
    x, grad = torch.randn(2, rows, size * n_groups, device=DEVICE, dtype=exact).to(dtype)
    skew = 0.3 * torch.randn(n_groups, size, size, device=DEVICE, dtype=torch.float64) / size**0.5
    return x, grad, torch.matrix_exp(skew - skew.mT).to(exact)


def assert_as_good(got, reference, truth):
    """Allow twice the error of the same computation in torch, plus a few float32 roundings.

    In float64 the reference is the truth itself, so 32 roundings of the largest element are added.
    """
    assert got.dtype == reference.dtype
    assert got.shape == truth.shape
    eps = {torch.float64: 32 * torch.finfo(torch.float64).eps}.get(got.dtype, 4 * 2**-23)
    atol = eps * float(truth.abs().max())
    error, allowed = (float((t.double() - truth).abs().max()) for t in (got, reference))
    assert error <= 2 * allowed + atol


def check(size, chunk, stride, n_groups, rows, transpose, dtype, splits):
    x, grad, stage = inputs(size, n_groups, rows, dtype)
    layout = chunk, stride

    def gradients(x, grad, stage):
        pair = (grad, x) if transpose else (x, grad)
        x_grad = rotate.rotate_reference(grad, stage, *layout, not transpose)
        return x_grad, rotate.rotate_stage_grad.reference(*pair, size, *layout, 1)[0]

    truth = x.double(), grad.double(), stage.double()
    y = rotate.rotate_reference(truth[0], truth[2], *layout, transpose)
    assert_as_good(
        kernels.rotate(x, stage, *layout, transpose),
        rotate.rotate_reference(x, stage, *layout, transpose),
        y,
    )
    factor = torch.randn(rows, device=DEVICE, dtype=stage.dtype)
    assert_as_good(
        kernels.rotate(x, stage, *layout, transpose, factor),
        rotate.rotate_reference(x, stage, *layout, transpose, factor),
        y * factor[:, None],
    )
    x_grad, partials = backward_kernels.rotate_backward(grad, x, stage, *layout, transpose, splits)
    true_x_grad, true_gram = gradients(*truth)
    reference_x_grad, _ = gradients(x, grad, stage)
    # The kernel never rounds sums to half precision, as torch's product does.
    sum_dtype = torch.promote_types(dtype, torch.float32)
    _, reference_gram = gradients(*(tensor.to(sum_dtype) for tensor in (x, grad, stage)))
    assert_as_good(x_grad, reference_x_grad, true_x_grad)
    assert partials.shape == (splits, n_groups, size, size)
    assert_as_good(partials.sum(0), reference_gram, true_gram)
    pair = (grad, x) if transpose else (x, grad)
    alone = backward_kernels.rotate_stage_grad(*pair, size, *layout, splits)
    assert alone.shape == partials.shape
    assert_as_good(alone.sum(0), reference_gram, true_gram)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.exhaustive_if(condition=lambda structure, dtype: not is_sampled(structure, dtype))
def test_every_structure(structure, dtype):
    check(*structure, dtype, splits=2)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 64, 67, 130])
@pytest.mark.parametrize("structure", [(8, 4, 2, 6), (32, 32, 1, 2)], ids=["bands", "plain"])
def test_every_number_of_rows(structure, rows, splits, transpose):
    """Numbers of rows are below, at and above a tile. Splits without rows leave zeros."""
    check(*structure, rows, transpose, torch.bfloat16, splits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [4, 32, 128])
def test_programs_that_take_several_tiles_of_rows(size, dtype, monkeypatch):
    small = H200._replace(multiprocessors=1, threads=32)  # one program at a time
    monkeypatch.setattr(kernels, "limits_of", lambda device: small)
    monkeypatch.setattr(kernels, "_rotate_launch", kernels._rotate_launch.__wrapped__)  # no cache
    x, _, stage = inputs(size, 2, 150, dtype)
    truth = rotate.rotate_reference(x.double(), stage.double(), size // 2, 2, False)
    reference = rotate.rotate_reference(x, stage, size // 2, 2, False)
    assert_as_good(kernels.rotate(x, stage, size // 2, 2, False), reference, truth)


@triton.jit
def list_positions(out_ptr, d, SIZE: tl.constexpr, BANDS: tl.constexpr):
    position, inside = positions(tl.program_id(0), 0, d, SIZE, 16, BANDS)
    band = tl.program_id(0) * BANDS + tl.arange(0, BANDS)[:, None]
    tl.store(out_ptr + band * 16 + tl.arange(0, 16)[None, :], tl.where(inside, position, -1))


@pytest.mark.parametrize("size", [1, 3, 4, 5, 7, 12, 15, 16])
def test_no_position_belongs_to_two_bands(size):
    """Both would store it. The interpreter runs one program at a time and never shows that race."""
    d = 11 * size
    programs = triton.cdiv(d, 4 * (16 // size * size))
    out = torch.empty(programs * 4 * 16, dtype=torch.int32, device=DEVICE)
    list_positions[(programs,)](out, d, SIZE=size, BANDS=4)
    assert sorted(out[out >= 0].tolist()) == list(range(d))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [4, 32, 256])
@pytest.mark.parametrize(("rows", "n_groups"), [(0, 2), (3, 0), (0, 0)])
def test_empty(size, rows, n_groups, dtype):
    x, grad, stage = inputs(size, n_groups, rows, dtype)
    assert kernels.rotate(x, stage, size, 1, False).shape == x.shape
    x_grad, partials = backward_kernels.rotate_backward(grad, x, stage, size, 1, False, 3)
    assert x_grad.shape == x.shape
    for sums in (partials, backward_kernels.rotate_stage_grad(x, grad, size, size, 1, 3)):
        assert sums.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(sums, sums.new_zeros(3, n_groups, size, size))


@pytest.mark.parametrize("size", [4, 32])
def test_tensors_that_are_not_contiguous(size):
    x, grad, stage = inputs(size, 4, 5, torch.float32)

    def spread(tensor):
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]

    odd = spread(x), spread(grad), spread(stage)
    assert not any(tensor.is_contiguous() for tensor in odd)
    layout = size // 2, 2
    y = kernels.rotate(x, stage, *layout, False)
    assert torch.equal(kernels.rotate(odd[0], odd[2], *layout, False), y)
    expected = backward_kernels.rotate_backward(grad, x, stage, *layout, False, 2)
    got = backward_kernels.rotate_backward(odd[1], odd[0], odd[2], *layout, False, 2)
    assert all(map(torch.equal, got, expected))
    assert torch.equal(backward_kernels.rotate_stage_grad(*odd[:2], size, *layout, 2), expected[1])


@pytest.mark.parametrize("size", [4, 32, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stage_dtype", [torch.float32, torch.float64], ids=str)
def test_a_small_change_is_not_rounded_away(size, dtype, stage_dtype):
    """0.997 rounds to 0.99609 in bfloat16, but S - I keeps its digits."""
    scale = 0.997
    x = torch.randn(64, size, device=DEVICE).to(dtype)
    stage = scale * torch.eye(size, device=DEVICE, dtype=stage_dtype)[None]
    pairs = [kernels.rotate(x, stage, size, 1, False)]
    pairs.append(backward_kernels.rotate_backward(x, x, stage, size, 1, False, 1)[0])
    for y in pairs:
        ratio = (y.double() * x.double()).sum() / x.double().square().sum()
        assert abs(float(ratio) - scale) < 2e-4


@pytest.mark.parametrize("op", TABLES)
def test_every_structure_has_a_tile_that_fits(op):
    tiles = set()
    for dtype in config_rotate.DTYPE_CLASSES:
        for size in range(1, config_rotate.MAX_SIZE + 1):
            for chunk, stride in {(size, 1), (1, 2)} | {(c, 2) for c in (2, 4, 8) if size % c == 0}:
                structure = {"size": size, "chunk": chunk, "stride": stride}
                tile = TABLES[op].default(structure, dtype, H200)
                tiles.add(tile)
                if tile is None:
                    assert op == "rotate_backward"
                    continue
                assert tile.bands == 1 or tile.bands >= tile.num_warps
                assert tile.bands == 1 or tile.columns == tile.inner >= size
                several = max(tile.columns, tile.inner) >= 2 * size
                assert tile.columns == tile.inner or not several
                # A residual product and the fused backward hold a whole group.
                whole = op == "rotate_backward" or (op == "rotate" and "16" in dtype)
                assert tile.inner >= size or not whole
    assert tiles - {None} == {tile for tile, _ in reachable_tiles(op, H200)}


def test_the_ops_ask_for_the_sizes_that_have_tiles():
    for size in (1, config_rotate.MAX_SIZE, config_rotate.MAX_SIZE + 1):
        x, stage, index = torch.zeros(2, size), torch.zeros(1, size, size), torch.zeros(2)
        calls = {
            rotate.rotate_rows: (x, stage, size, 1, False),
            rotate.rotate_stage_grad: (x, x, size, size, 1, 1),
            rotate.rotate_backward: (x, x, stage, size, 1, False, 1),
            rotate_indexed_rows: (x, stage[None], index, size, 1, False),
            segment_stage_grads: (x, x, index, size, size, 1, 1),
        }
        for op, args in calls.items():
            assert op.supports("triton", args) == (size <= config_rotate.MAX_SIZE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, in the interpreter
def test_numbers_that_are_not_finite_stay_in_their_row_and_tile(bad, size, dtype):
    """docs/kernels.md: groups that share a product share what is not finite, and nothing else."""
    x, grad, stage = inputs(size, 128 // size, 20, dtype)
    group = 70 // size
    ill, others = x.clone(), torch.arange(20) != 3
    ill[3, 70] = bad
    y, clean = (kernels.rotate(t, stage, size, 1, False) for t in (ill, x))
    assert torch.equal(y[others], clean[others])
    expected = rotate.rotate_reference(ill, stage, size, 1, False)[3].isfinite()
    assert not expected[group * size : (group + 1) * size].any()
    assert not (y[3].isfinite() & ~expected).any()
    width = max(size, 16 if dtype == torch.float32 else 64)
    inside = torch.arange(128) // width == 70 // width
    assert torch.equal(y[3, ~inside], clean[3, ~inside])

    _, partials = backward_kernels.rotate_backward(grad, ill, stage, size, 1, False, 1)
    _, clean = backward_kernels.rotate_backward(grad, x, stage, size, 1, False, 1)
    neighbors = torch.arange(128 // size) != group
    assert torch.equal(partials[:, neighbors], clean[:, neighbors])
    assert not partials[:, group].isfinite().all()
