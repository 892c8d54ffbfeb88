"""Multiplicative dropout: exact counts, the same mask in forward and backward, reproducible."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from boft_ops import MultiplicativeDropout, cayley, multiplicative_dropout


def dropped(out):
    """(m, K) mask of the blocks that are the identity."""
    return (out == torch.eye(out.shape[-1], dtype=out.dtype)).all(-1).all(-1)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 100), st.integers(0, 100))
def test_exact_counts(m, n_blocks, component_percent, block_percent):
    blocks = torch.full((m, n_blocks, 4, 4), 0.5)
    out = multiplicative_dropout(
        blocks, component_percent / 100, block_percent / 100, training=True
    )
    per_factor = dropped(out).sum(1).tolist()
    n_components = component_percent * m // 100  # floors of exact decimals
    n_dropped = block_percent * n_blocks // 100
    if n_components == 0 or n_dropped == 0:
        assert out is blocks
    else:
        assert sorted(per_factor) == [0] * (m - n_components) + [n_dropped] * n_components
    assert torch.equal(out[~dropped(out)], blocks[~dropped(out)])  # nothing is rescaled


def test_masks_are_uniform():
    counts = torch.zeros(4, 8)
    blocks = torch.full((4, 8, 2, 2), 0.5)
    for _ in range(4000):
        counts += dropped(multiplicative_dropout(blocks, 0.5, 0.25, training=True))
    # each block with probability 1/8: mean 500, standard deviation 21
    assert (counts - 500).abs().max() < 110


def test_evaluation_and_zero_do_nothing():
    blocks = torch.randn(2, 4, 4, 4)
    assert multiplicative_dropout(blocks, 0.5, 0.5, training=False) is blocks
    assert multiplicative_dropout(blocks, 0.0, 0.5, training=True) is blocks
    layer = MultiplicativeDropout(1.0, 1.0)
    assert dropped(layer(blocks)).all()
    assert layer.eval()(blocks) is blocks


def test_gradient_of_dropped_blocks_is_zero():
    blocks = torch.randn(4, 16, 4, 4, requires_grad=True)
    out = multiplicative_dropout(blocks, 0.5, 0.5, training=True)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    mask = dropped(out)
    assert (blocks.grad[mask] == 0).all()
    assert torch.equal(blocks.grad[~mask], upstream[~mask])


def test_orthogonality_is_kept():
    out = multiplicative_dropout(cayley(torch.randn(3, 8, 6)), 0.7, 0.6, training=True)
    torch.testing.assert_close(out.mT @ out, torch.eye(4).expand_as(out), rtol=0, atol=1e-6)


def test_generators():
    blocks = torch.full((4, 32, 2, 2), 0.5)

    def draw(generator=None):
        return multiplicative_dropout(blocks, 0.5, 0.5, training=True, generator=generator)

    torch.manual_seed(3)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, draw())
    own = torch.Generator().manual_seed(3)
    state = torch.get_rng_state()
    assert torch.equal(draw(own), first)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator was left alone


def test_recomputation_draws_the_same_mask():
    blocks = torch.randn(4, 32, 4, 4, requires_grad=True)
    upstream = torch.randn(4, 32, 4, 4)

    def function(blocks):
        return multiplicative_dropout(blocks.sin(), 0.5, 0.5, training=True)

    out = checkpoint(function, blocks, use_reentrant=False)
    out.backward(upstream)
    mask = dropped(out)
    assert mask.any()
    assert (blocks.grad[mask] == 0).all()
    torch.testing.assert_close(blocks.grad[~mask], (upstream * blocks.cos())[~mask])


@pytest.mark.parametrize(
    ("p_component", "p_block", "error", "match"),
    [
        (1.5, 0.1, ValueError, r"p_component: expected a number in \[0, 1\], got 1.5"),
        (0.1, float("nan"), ValueError, "p_block: expected"),
        (-0.1, 0.1, ValueError, "p_component: expected"),
        ("half", 0.1, TypeError, "p_component: expected a number.*got str"),
        (True, 0.1, TypeError, "p_component: expected a number.*got bool"),
    ],
)
def test_bad_arguments(p_component, p_block, error, match):
    with pytest.raises(error, match=match):
        multiplicative_dropout(torch.zeros(1, 1, 2, 2), p_component, p_block, training=True)
    with pytest.raises(error, match=match):
        MultiplicativeDropout(p_component, p_block)


def test_bad_blocks():
    with pytest.raises(ValueError, match=r"blocks: expected shape.*got \(4, 2, 2\)"):
        multiplicative_dropout(torch.zeros(4, 2, 2), 0.1, 0.1, training=True)
