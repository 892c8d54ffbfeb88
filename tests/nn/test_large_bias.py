"""A large bias in half precision does not take the digits of the scale's gradient."""

import pytest
import torch
from torch import nn

from boft_ops import MultiAdapterLinear, butterfly_matmul


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("bias", [0.0, 30.0, 400.0])
def test_the_gradient_of_a_scale_over_a_base_that_is_called(bias, by_rows):
    base = nn.Linear(64, 64, dtype=torch.bfloat16)
    nn.init.zeros_(base.bias)
    base.bias.data[::16] = bias
    layer = MultiAdapterLinear(base)
    adapter = layer.add_adapter("a", block_size=8)
    nn.init.normal_(adapter.skew, std=0.1)
    x, grad = torch.randn(2, 256, 64).bfloat16()
    y = layer(x, torch.zeros(256, dtype=torch.int64)) if by_rows else layer(x)
    (got,) = torch.autograd.grad(y, adapter.scale_offset, grad)
    z = butterfly_matmul(x.double(), adapter.blocks().double()) @ base.weight.double().T
    want = (grad.double() * z).sum(0)
    assert ((got.double() - want).norm() / want.norm()) < 0.01
    torch.testing.assert_close(y.double(), z + base.bias.double(), rtol=0.02, atol=0.05)
