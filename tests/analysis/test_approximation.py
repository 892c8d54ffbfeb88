"""The approximation of orthogonal matrices by products of block factors."""

import pytest
import reference
import torch

from boft_ops import butterfly_matmul, cayley
from boft_ops.analysis.approximation import (
    Factor,
    approximate,
    butterfly_factors,
    nearest_rotation,
    shuffle_factors,
)
from boft_ops.analysis.transmission import pattern
from boft_ops.ops.geodesic import inverse_cayley


def orthogonal(n, d):
    return torch.linalg.qr(torch.randn(n, d, d, dtype=torch.float64)).Q


@pytest.mark.parametrize("b", [1, 2, 3, 4, 8])
def test_nearest_rotation(b):
    """The inner product is the sum of the singular values.

    The smallest singular value counts with the sign of the determinant.
    """
    matrices = torch.randn(40, b, b, dtype=torch.float64)
    nearest = nearest_rotation(matrices)
    eye = torch.eye(b, dtype=torch.float64)
    torch.testing.assert_close(nearest @ nearest.mT, eye.expand_as(nearest))
    torch.testing.assert_close(torch.linalg.det(nearest), torch.ones(40, dtype=torch.float64))
    values = torch.linalg.svdvals(matrices)
    values[:, -1] *= torch.linalg.det(matrices).sign()
    torch.testing.assert_close((nearest * matrices).sum((1, 2)), values.sum(1))


@pytest.mark.parametrize("d_b_m", [(16, 2, 4), (64, 4, 5), (64, 2, 3), (48, 6, 2), (256, 8, 6)])
def test_blocks_are_a_butterfly_with_the_reported_error(d_b_m):
    d, b, m = d_b_m
    targets = orthogonal(2, d)
    fit = approximate(targets, butterfly_factors(d, b, m), max_sweeps=4)
    blocks = fit.blocks.unflatten(1, (2, d // b))
    eye = torch.eye(b, dtype=torch.float64)
    torch.testing.assert_close(blocks @ blocks.mT, eye.expand_as(blocks))
    for i, target in enumerate(targets):
        r = reference.rotation(blocks[:, i])
        error = (r - target).square().sum() / (2 * d)
        torch.testing.assert_close(fit.errors[-1, i], error)
    assert (fit.errors.diff(dim=0) < 1e-12).all()  # the error never grows


def test_shuffled_blocks_have_the_reported_error():
    d, factors = 32, shuffle_factors(32, 8, 3)
    (target,) = targets = orthogonal(1, d)
    fit = approximate(targets, factors, max_sweeps=5)
    r = torch.eye(d, dtype=torch.float64)
    for blocks, factor in zip(fit.blocks, factors):
        allowed = pattern(d, [factor])[0]
        matrix = torch.zeros(d, d, dtype=torch.float64)
        for block, first in zip(blocks, block_starts(allowed)):
            rows = allowed[first].nonzero().flatten()
            matrix[rows[:, None], rows] = block
        r = matrix @ r
    torch.testing.assert_close(fit.errors[-1, 0], (r - target).square().sum() / (2 * d))
    assert (fit.errors.diff(dim=0) < 1e-12).all()


def block_starts(allowed):
    """List the first feature of each block, in the order of the features."""
    return [i for i, row in enumerate(allowed) if int(row.nonzero()[0]) == i]


@pytest.mark.parametrize("b", [2, 4, 5])
def test_one_factor_is_solved_exactly(b):
    targets = orthogonal(3, 20)
    fit = approximate(targets, butterfly_factors(20, b, 1))
    assert len(fit.errors) == 1
    blocks = targets.unflatten(1, (20 // b, b)).unflatten(3, (20 // b, b))
    diagonal = blocks.diagonal(dim1=1, dim2=3).movedim(3, 1)
    values = torch.linalg.svdvals(diagonal)
    values[..., -1] *= torch.linalg.det(diagonal).sign()
    torch.testing.assert_close(fit.errors[0], 1 - values.sum((1, 2)) / 20)


def test_a_butterfly_is_recovered():
    skew = 0.4 * torch.randn(3, 4, 6, dtype=torch.float64)
    r = butterfly_matmul(torch.eye(16, dtype=torch.float64), cayley(skew))
    fit = approximate(r[None], butterfly_factors(16, 4, 3), max_sweeps=400, tolerance=0)
    assert fit.errors[-1] < 1e-8


def test_the_fit_stops_when_doubling_the_sweeps_gains_little():
    fit = approximate(orthogonal(2, 16), butterfly_factors(16, 4, 3), tolerance=1e-2)
    assert len(fit.errors) in (50, 100)
    gain = (fit.errors[len(fit.errors) // 2 - 1] - fit.errors[-1]).mean()
    assert gain < 1e-2


def test_start():
    targets, factors = orthogonal(1, 16), butterfly_factors(16, 2, 4)
    first = approximate(targets, factors, max_sweeps=10)
    more = approximate(targets, factors, max_sweeps=1, start=first.blocks)
    assert more.errors[-1] <= first.errors[-1] + 1e-12


@pytest.mark.parametrize("b", [1, 2, 3, 8])
def test_inverse_cayley(b):
    skew = 3 * torch.randn(5, b * (b - 1) // 2, dtype=torch.float64)
    torch.testing.assert_close(inverse_cayley(cayley(skew)), skew)


@pytest.mark.parametrize(("d", "b", "m"), [(32, 8, 4), (64, 4, 3), (512, 16, 6), (16, 2, 4)])
def test_shuffles_are_permutations_between_block_diagonal_factors(d, b, m):
    shuffled = torch.arange(d).reshape(d // b, b).T.flatten()  # feature at each position
    diagonal = torch.block_diag(*[torch.ones(b, b)] * (d // b)).bool()
    order = torch.arange(d)
    for factor in pattern(d, shuffle_factors(d, b, m)):
        expected = torch.zeros(d, d, dtype=torch.bool)
        expected[order[:, None], order] = diagonal
        assert torch.equal(factor, expected)
        order = order[shuffled]


def test_shuffles_of_pairs_are_the_butterfly():
    assert torch.equal(
        pattern(32, shuffle_factors(32, 2, 5)), pattern(32, butterfly_factors(32, 2, 5))
    )


def test_bad_arguments():
    with pytest.raises(ValueError, match="targets: expected shape"):
        approximate(torch.randn(4, 4), butterfly_factors(4, 2, 1))
    with pytest.raises(ValueError, match="factors: expected ones that divide 12"):
        approximate(orthogonal(1, 12), [Factor(8, 8, 1)])
    with pytest.raises(TypeError, match="targets"):
        approximate(torch.ones(1, 4, 4, dtype=torch.int64), butterfly_factors(4, 2, 1))
    with pytest.raises(ValueError, match="d: expected a power of two"):
        shuffle_factors(48, 4, 2)
    with pytest.raises(ValueError, match="block_size: expected at most"):
        shuffle_factors(8, 16, 2)
    with pytest.raises(ValueError, match="n_factors"):
        butterfly_factors(8, 4, 3)
