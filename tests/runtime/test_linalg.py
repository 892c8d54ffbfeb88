"""LU decompositions: no batch of large matrices reaches LAPACK in one call on a CPU."""

import subprocess
import sys
import time

import pytest
import torch

from boft_ops import cayley
from boft_ops._runtime import linalg
from boft_ops.analysis.approximation import nearest_rotation
from boft_ops.ops.geodesic import inverse_cayley

LARGE = linalg.MAX_BATCHED + 1


class _Decompositions(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the shape of every matrix that is decomposed."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if any(part in name for part in ("inv_ex", "linalg_lu", "solve_ex", "_linalg_det")):
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


def _rotations(b):
    return cayley(0.1 * torch.randn(2, 3, b * (b - 1) // 2, dtype=torch.float64))


@pytest.mark.parametrize(
    "call",
    [
        lambda b: _rotations(b),
        lambda b: torch.func.vmap(cayley)(torch.randn(2, b * (b - 1) // 2)),
        lambda b: inverse_cayley(_rotations(b)),
        lambda b: nearest_rotation(_rotations(b)),
        lambda b: linalg.inverse(_rotations(b)),
    ],
    ids=["cayley", "vmap", "inverse_cayley", "nearest_rotation", "inverse"],
)
def test_large_matrices_are_decomposed_one_at_a_time(call):
    with _Decompositions() as seen:
        call(2 * LARGE)
    assert seen.shapes
    assert {shape for shape in seen.shapes if len(shape) > 2} == set()


@pytest.mark.parametrize("b", [1, 5, LARGE])
def test_inverse_and_determinant_are_torchs(b):
    matrices = torch.eye(b, dtype=torch.float64) + 0.1 * torch.randn(2, 3, b, b).double()
    each = [torch.linalg.inv(m) for m in matrices.flatten(0, 1)]
    expected = torch.stack(each).unflatten(0, (2, 3))
    torch.testing.assert_close(linalg.inverse(matrices), expected, rtol=1e-9, atol=1e-12)
    each = torch.stack([torch.linalg.det(m) for m in matrices.flatten(0, 1)])
    torch.testing.assert_close(linalg.determinant(matrices), each.unflatten(0, (2, 3)))
    assert linalg.inverse(matrices[:0]).shape == (0, 3, b, b)


def test_inverse_is_differentiable_twice_and_in_batches():
    matrices = torch.eye(3, dtype=torch.float64) + 0.1 * torch.randn(2, 3, 3).double()
    matrices.requires_grad_()
    assert torch.autograd.gradcheck(linalg.inverse, (matrices,), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(linalg.inverse, (matrices,))


def test_a_call_that_hangs_in_c_is_killed(tmp_path, pytestconfig):
    """The timeout of the project's settings ends a test that never returns from C code."""
    (tmp_path / "test_hang.py").write_text(
        "import ctypes\ndef test_hang():\n    ctypes.CDLL(None).sleep(100)\n"
    )
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c",
         str(pytestconfig.inipath), "--rootdir", str(tmp_path), "--timeout", "2", str(tmp_path)],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert run.returncode != 0
    assert "Timeout" in run.stdout + run.stderr
    assert time.monotonic() - began < 60
