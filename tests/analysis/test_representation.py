"""Every rotation is a kaleidoscope with the parameters that are computed for it."""

import pytest
import torch

from boft_ops import cayley, kaleidoscope_matmul
from boft_ops.analysis.representation import dense_factors, kaleidoscope_parameters


def random_rotation(d):
    q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    q[:, 0] *= torch.linalg.det(q).sign()
    return q


def special_rotations(d):
    """Make rotations with eigenvalues of -1, with columns of the identity, and permutations."""
    eye = torch.eye(d, dtype=torch.float64)
    half_turn, cycle, one_plane = eye.clone(), eye.roll(1, 0), eye.clone()
    half_turn[0, 0] = half_turn[-1, -1] = -1
    cycle[0] *= torch.linalg.det(cycle)
    one_plane[-2:, -2:] = random_rotation(2)
    near_eye = eye + 1e-9 * (eye.roll(1, 0) - eye.roll(1, 0).T)
    near_eye = torch.linalg.qr(near_eye).Q.abs() * near_eye.sign()
    return [eye, -eye, half_turn, cycle, one_plane, near_eye]


@pytest.mark.parametrize(("d", "b"), [(2, 2), (4, 2), (4, 4), (8, 2), (12, 6), (16, 4), (16, 2)])
def test_every_rotation_is_represented(d, b):
    m = dense_factors(d, b)
    for matrix in [*special_rotations(d), *(random_rotation(d) for _ in range(10))]:
        first, second = kaleidoscope_parameters(matrix, b)
        assert first.shape == second.shape == (d - 1, m, d // b, b * (b - 1) // 2)
        r = kaleidoscope_matmul(torch.eye(d, dtype=torch.float64), cayley(first), cayley(second))
        torch.testing.assert_close(r, matrix, rtol=0, atol=1e-13)
        assert max(first.abs().max(), second.abs().max()) <= 1 + 1e-12


def test_float32_rotations_are_represented_to_their_rounding():
    matrix = random_rotation(8).float()
    first, second = kaleidoscope_parameters(matrix)
    r = kaleidoscope_matmul(torch.eye(8, dtype=torch.float64), cayley(first), cayley(second))
    torch.testing.assert_close(r, matrix.double(), rtol=0, atol=1e-6)


def test_other_matrices_are_refused():
    mirror = torch.diag(torch.tensor([-1.0, 1, 1, 1]))
    with pytest.raises(ValueError, match="expected determinant"):
        kaleidoscope_parameters(mirror)
    with pytest.raises(ValueError, match="expected an orthogonal matrix"):
        kaleidoscope_parameters(2 * torch.eye(4))
    with pytest.raises(ValueError, match="expected shape"):
        kaleidoscope_parameters(torch.ones(4, 2))
    with pytest.raises(ValueError, match="block_size: expected an even number"):
        kaleidoscope_parameters(torch.eye(12), 4)
    with pytest.raises(ValueError, match="block_size: expected an even number"):
        kaleidoscope_parameters(torch.eye(9), 9)
