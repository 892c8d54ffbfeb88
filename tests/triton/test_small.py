"""Triton kernels that make the stages against the ops' references; float64 is the truth.

They run on a GPU if there is one, else in Triton's interpreter, which takes seconds for a GPU's
microseconds. So each structure runs with one combination of mask, splits and dtype, and every such
combination runs with one or two structures. Group counts are odd, so that the last program is
partly empty if programs own several groups.
"""

import importlib
import os
import sys

import pytest
import torch

from boft_ops._runtime import backend
from boft_ops.ops.cayley import cayley_backward_reference, cayley_reference
from boft_ops.ops.compose import compose_backward_reference, compose_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton is a dependency on Linux only"),
    pytest.mark.skipif(
        DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
        reason="neither a GPU nor the interpreter",
    ),
    pytest.mark.skipif(not backend.has_triton(), reason="triton is not installed"),
]

STRUCTURES = [(1, 2), (1, 3), (1, 8), (2, 8), (2, 6), (3, 4), (4, 4), (1, 64), (2, 32), (6, 2)]
ATOL = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}


def kernels(name):
    return importlib.import_module(f"boft_ops.triton_kernels.{name}")


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def dropout(share, *shape):
    """Random drop drop_mask that drops "some" blocks or "all"; None for "none"."""
    if share == "none":
        return None
    return torch.full(shape, share == "all", device=DEVICE) | (
        torch.rand(shape, device=DEVICE) < (0.4 if share == "some" else 0)
    )


def check(got, reference, truth, scale=1.0):
    """Allow twice the error of the same-dtype reference, plus a few roundings of the largest."""
    assert got.dtype == reference.dtype
    assert got.shape == reference.shape
    assert got.isfinite().all()
    error = (got.double() - truth).abs().max().item()
    allowed = (reference.double() - truth).abs().max().item()
    assert error <= 2 * allowed + ATOL[got.dtype] * max(scale, truth.abs().max().item())


@pytest.mark.parametrize("drop", ["none", "some", "all"])
@pytest.mark.parametrize(
    ("b", "dtype"),
    [(2, torch.float32), (3, torch.float64), (8, torch.bfloat16), (64, torch.float32)],
)
def test_cayley_with_dropout(b, dtype, drop):
    shape = (2, 9) if b < 64 else (1, 2)
    drop_mask = dropout(drop, *shape)
    skew = random(*shape, b * (b - 1) // 2, dtype=dtype)
    blocks = kernels("cayley").cayley(skew, drop_mask)
    check(blocks, cayley_reference(skew, drop_mask), cayley_reference(skew.double(), drop_mask))
    if drop_mask is not None:
        eye = torch.eye(b, dtype=dtype, device=DEVICE)
        assert torch.equal(blocks[drop_mask], eye.expand_as(blocks[drop_mask]))
    grad = random(*blocks.shape, dtype=dtype)
    skew_grad = kernels("cayley").cayley_backward(blocks, drop_mask, grad)
    truth = cayley_backward_reference(blocks.double(), drop_mask, grad.double())
    check(skew_grad, cayley_backward_reference(blocks, drop_mask, grad), truth)
    if drop_mask is not None:
        assert not skew_grad[drop_mask].any()


def check_compose(m, b, first, splits, dtype, n_runs):
    """Compose factors that are not orthogonal, in ``n_runs`` runs of 2^first groups."""
    size = b << (m - 1)
    n_blocks = n_runs << (m - 1 + first)
    factors = random(m, n_blocks, b, b, dtype=dtype)
    truth = compose_reference(factors.double(), first)
    stage = kernels("compose").compose(factors, first)
    check(stage, compose_reference(factors, first), truth)
    grad = random(splits, n_blocks * b // size, size, size, dtype=dtype)
    truth = compose_backward_reference(factors.double(), grad.double(), first)
    got = kernels("compose").compose_backward(factors, grad, first)
    check(got, compose_backward_reference(factors, grad, first), truth)


@pytest.mark.parametrize(
    ("m", "b", "first"),
    [(m, b, i % 3 if m > 1 else 0) for i, (m, b) in enumerate(STRUCTURES)] + [(5, 8, 0)],
)
def test_compose(m, b, first):
    n_runs = 3 if b << m <= 64 else 1
    check_compose(m, b, first, 1 + 2 * (b % 4 == 0), torch.float32, n_runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_compose_strides_splits_dtypes(first, splits, dtype):
    check_compose(3, 4, first, splits, dtype, n_runs=3)


def check_rotation(m, b, splits, drop, dtype, n_groups, scale=1.0):
    size = b << (m - 1)
    n_blocks = n_groups * size // b
    drop_mask = dropout(drop, m, n_blocks)
    skew = (random(m, n_blocks, b * (b - 1) // 2) * scale).to(dtype)
    compute_dtype = torch.promote_types(dtype, torch.float32)
    blocks, stage = kernels("stage_from_skew").stage_from_skew(skew, drop_mask)
    truth = cayley_reference(skew.double(), drop_mask)
    reference = cayley_reference(skew.to(compute_dtype), drop_mask)
    check(blocks, reference, truth)
    check(stage, compose_reference(reference, 0), compose_reference(truth, 0))
    grad = random(splits, n_groups, size, size, dtype=compute_dtype)
    skew_grad = kernels("stage_from_skew").stage_from_skew_backward(blocks, drop_mask, grad)

    def backward(blocks, grad):
        return cayley_backward_reference(
            blocks, drop_mask, compose_backward_reference(blocks, grad, 0)
        )

    check(skew_grad, backward(blocks, grad), backward(blocks.double(), grad.double()))
    if drop_mask is not None:
        eye = torch.eye(b, dtype=compute_dtype, device=DEVICE)
        assert torch.equal(blocks[drop_mask], eye.expand_as(blocks[drop_mask]))
        assert not skew_grad[drop_mask].any()
    return blocks, stage


@pytest.mark.parametrize(("m", "b"), STRUCTURES)
def test_rotation(m, b):
    size = b << (m - 1)
    check_rotation(m, b, 1 + b % 4 // 2, "some", torch.float32, n_groups=256 // size**2 + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("drop", ["none", "some", "all"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("m", "b"), [(1, 3), (2, 4)])
def test_stage_from_skew_splits_masks_dtypes(m, b, splits, drop, dtype):
    check_rotation(m, b, splits, drop, dtype, n_groups=5)


def test_stage_from_skew_of_large_skew_is_orthogonal():
    blocks, stage = check_rotation(2, 8, 1, "none", torch.float32, 2, scale=100.0)
    for q in (blocks.double(), stage.double()):
        eye = torch.eye(q.shape[-1], dtype=q.dtype, device=DEVICE)
        assert (q.mT @ q - eye).abs().max() < 1e-6


def test_one_factor_is_its_own_stage():
    blocks, stage = kernels("stage_from_skew").stage_from_skew(random(1, 3, 6), None)
    assert stage.data_ptr() != blocks.data_ptr()  # torch.compile relies on it
    assert torch.equal(stage, blocks[0])


def test_strided_operands():
    skew = random(2, 28, 4).mT
    drop = dropout("some", 4, 2).mT
    blocks, stage = kernels("stage_from_skew").stage_from_skew(skew, drop)
    expected = kernels("stage_from_skew").stage_from_skew(skew.contiguous(), drop.contiguous())
    assert torch.equal(blocks, expected[0])
    assert torch.equal(stage, expected[1])
    grad = random(2, 2, 16, 16).mT
    got = kernels("stage_from_skew").stage_from_skew_backward(blocks, drop, grad)
    assert torch.equal(
        got, kernels("stage_from_skew").stage_from_skew_backward(blocks, drop, grad.contiguous())
    )
    factors = blocks.mT
    got = kernels("compose").compose(factors, 0)
    assert torch.equal(got, kernels("compose").compose(factors.contiguous(), 0))


def test_nothing_to_do():
    assert kernels("cayley").cayley(random(0, 28), None).shape == (0, 8, 8)
    blocks, stage = kernels("stage_from_skew").stage_from_skew(random(2, 0, 28), None)
    assert blocks.shape == (2, 0, 8, 8)
    assert stage.shape == (0, 16, 16)
    grad = kernels("stage_from_skew").stage_from_skew_backward(blocks, None, random(3, 0, 16, 16))
    assert grad.shape == (2, 0, 28)
    assert kernels("compose").compose(blocks, 0).shape == (0, 16, 16)
    grad = kernels("compose").compose_backward(blocks, random(3, 0, 16, 16), 0)
    assert grad.shape == blocks.shape
