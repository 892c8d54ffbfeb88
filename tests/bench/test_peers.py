"""Agreement with PEFT's BOFT and OFT and with the paper's parameter counts."""

import copy

import peft
import pytest
import torch
from torch import nn

from boft_ops import BOFTLinear, OFTLinear


def tuned(base, config, name="0"):
    """Make PEFT's own layer around ``base``."""
    return peft.get_peft_model(nn.Sequential(base), config).base_model.model.get_submodule(name)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("b", [2, 4])
def test_peft_boft_forward_and_gradient(peft_extension, m, b):
    base = nn.Linear(32, 24)
    config = peft.BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, target_modules=["0"])
    theirs = tuned(copy.deepcopy(base), config)
    parameter, scale = theirs.boft_R["default"], theirs.boft_s["default"]
    assert parameter.shape == (m, 32 // b, b, b)
    nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(scale, mean=1.0, std=0.2)
    ours = BOFTLinear.from_linear(base, block_size=b, n_factors=m)
    i, j = torch.triu_indices(b, b, 1)
    q = -0.5 * (parameter - parameter.mT)  # PEFT's block is (I - S)(I + S)^-1
    with torch.no_grad():
        ours.skew.copy_(q[..., i, j])
        ours.scale_offset.copy_(scale[:, 0] - 1)
    x = torch.randn(7, 32)
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)
    upstream = torch.randn_like(expected)
    want, want_scale = torch.autograd.grad(expected, (parameter, scale), upstream)
    got, got_scale = torch.autograd.grad(ours(x), (ours.skew, ours.scale_offset), upstream)
    # The parameter of PEFT is an unconstrained matrix: the entries (i, j) and (j, i) each get half
    # the sign of the gradient is the opposite one.
    torch.testing.assert_close(-0.5 * got, want[..., i, j], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_scale, want_scale[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("neumann", "sign"), [(False, -1), (True, 1)])
def test_peft_oft(neumann, sign):
    base = nn.Linear(32, 24)
    config = peft.OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=neumann, target_modules=["0"])
    theirs = tuned(copy.deepcopy(base), config)
    weight = theirs.oft_R["default"].weight
    nn.init.normal_(weight, std=0.05)
    method = "neumann5" if neumann else "exact"
    ours = OFTLinear.from_linear(base, block_size=8, scale=False, method=method)
    with torch.no_grad():
        ours.skew.copy_(sign * weight[None])
    x = torch.randn(5, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("m", "b", "millions"), [(1, 16, 0.79), (2, 8, 0.75)])
def test_parameter_counts_of_deberta_v3_base(m, b, millions):
    """The counts are those of the paper's table: 12 blocks, with scale and trained bias."""
    shapes = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    total = 0
    for d, n in shapes * 12:
        layer = BOFTLinear(d, n, block_size=b, n_factors=m, device="meta")
        assert layer.n_effective_parameters == m * d * (b - 1) // 2 + n
        layer.bias.requires_grad_(True)
        total += layer.n_effective_parameters
    assert round(total / 1e6, 2) == millions
