"""Properties that an orthogonal transform keeps, and the path from the identity to a rotation."""

import math

import pytest
import torch

from boft_ops import BOFTLinear, butterfly_matmul, cayley
from boft_ops.analysis.spectrum import (
    drift,
    hyperspherical_energy,
    orthogonality_error,
    pairwise_angles,
)
from boft_ops.ops.geodesic import geodesic


def random_weight(n=12, d=32):
    return torch.randn(n, d, dtype=torch.float64)


def test_a_rotation_moves_the_weight_and_nothing_else():
    weight = random_weight()
    blocks = cayley(0.5 * torch.randn(3, 4, 28, dtype=torch.float64))
    moved = drift(weight, butterfly_matmul(weight, blocks, transpose=True))
    assert moved.distance > 0.5
    assert max(moved[1:]) < 1e-12


def test_a_scale_moves_singular_values_but_no_angle():
    weight = random_weight()
    moved = drift(weight, weight * torch.linspace(0.5, 2, 12, dtype=torch.float64)[:, None])
    assert min(moved.singular_values, moved.spectral_norm) > 0.1
    assert max(moved.energy, moved.angle) < 1e-12


def test_drift_by_hand():
    before = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    after = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    moved = drift(before, after)
    values = torch.linalg.svdvals(after.double())
    assert moved.distance == pytest.approx(math.sqrt(2 / 5))
    assert moved.spectral_norm == pytest.approx(values[0].item() / 2 - 1)
    assert moved.singular_values == pytest.approx((values[0].item() - 2) / 2)
    assert moved.angle == pytest.approx(math.pi / 4)
    # The only pair is at 90 degrees before, a distance of sqrt(2), and at 45 degrees after.
    assert moved.energy == pytest.approx(math.sqrt(2 / (2 - math.sqrt(2))) - 1)


def test_angles_and_energy_pair_by_pair():
    weight = random_weight(5)
    unit = weight / weight.norm(dim=1, keepdim=True)
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    angles = torch.stack([torch.arccos(unit[i] @ unit[j]) for i, j in pairs])
    torch.testing.assert_close(pairwise_angles(weight), angles)
    energy = sum(1 / (unit[i] - unit[j]).norm().item() for i, j in pairs)
    assert hyperspherical_energy(weight) == pytest.approx(energy)


def test_orthogonality_error():
    eye = torch.eye(6, dtype=torch.float64)
    assert orthogonality_error(torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q) < 1e-14
    assert orthogonality_error(1.001 * eye) == pytest.approx(0.002, rel=1e-3)
    # The error of several matrices is the root mean square of their errors.
    assert orthogonality_error(torch.stack([eye, 1.001 * eye])) == pytest.approx(
        0.002001 / math.sqrt(2)
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: drift(w, w[:, :2]), ValueError, "after: expected shape"),
        (lambda w: drift(w[0], w), ValueError, "before: expected shape"),
        (lambda w: pairwise_angles(w.long()), TypeError, "weight: expected a dtype"),
        (lambda w: hyperspherical_energy(0 * w), ValueError, "weight: expected no zero rows"),
        (
            lambda w: hyperspherical_energy(w[:1].expand(3, -1)),
            ValueError,
            "weight: expected rows of different directions",
        ),
        (lambda w: orthogonality_error(w), ValueError, "matrix: expected shape"),
        (lambda w: geodesic(w[:, :3], math.inf), ValueError, "t: expected a finite number"),
        (lambda w: geodesic(w[:, :3], "1"), TypeError, "t: expected a finite number"),
        (lambda w: geodesic(w[:, :2], 0.5), ValueError, "skew: expected a last dimension"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(4, 6))


@pytest.mark.parametrize("b", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_the_geodesic_is_a_power_of_the_rotation(b, size):
    skew = size * torch.randn(2, 5, b * (b - 1) // 2, dtype=torch.float64)
    r = cayley(skew)
    third = cayley(geodesic(skew, 1 / 3))
    torch.testing.assert_close(third @ third @ third, r, atol=1e-10, rtol=0)
    torch.testing.assert_close(geodesic(skew, 1.0), skew, atol=1e-8 * size, rtol=1e-8)
    assert torch.equal(geodesic(skew, 0.0), torch.zeros_like(skew))
    # The speed is constant: equal steps of t turn by equal rotations.
    steps = [cayley(geodesic(skew, t)) for t in (0.2, 0.4, 0.6)]
    torch.testing.assert_close(steps[2] @ steps[1].mT, steps[1] @ steps[0].mT, atol=1e-10, rtol=0)


def test_a_plane_turns_by_a_share_of_its_angle():
    q = math.tan(1.2 / 2)  # R turns by 2 atan(q)
    r = cayley(geodesic(torch.tensor([q], dtype=torch.float64), 0.25))
    assert math.atan2(abs(r[0, 1].item()), r[0, 0].item()) == pytest.approx(0.3)


def test_the_geodesic_of_a_small_rotation_is_a_multiple_of_q():
    skew = 1e-3 * torch.randn(4, 28, dtype=torch.float64)
    torch.testing.assert_close(geodesic(skew, 0.3), 0.3 * skew, atol=1e-7, rtol=0)
    assert geodesic(skew.bfloat16(), 0.3).dtype == torch.bfloat16


def test_the_layer_keeps_the_spectrum_of_a_float32_weight():
    layer = BOFTLinear(64, 48, block_size=8, n_factors=3, scale=False)
    torch.nn.init.normal_(layer.skew, std=0.3)
    moved = drift(layer.frozen_weight, layer.merged_weight())
    assert moved.distance > 0.3
    assert max(moved[1:]) < 1e-6
