"""Small models with PEFT adapters, for the tests of boft_ops.interop.peft."""

import copy

import peft
import torch
from torch import nn


class Net(nn.Module):
    """Two convolutions and two linear layers; the last of each has no bias."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 8, 1, stride=2, bias=False)
        self.hidden = nn.Linear(8 * 4 * 4, 24)
        self.out = nn.Linear(24, 12, bias=False)

    def forward(self, x):
        x = torch.tanh(self.point(torch.tanh(self.conv(x))))
        return self.out(torch.tanh(self.hidden(x.flatten(1))))


def net():
    """Make a Net and a batch for it."""
    return Net(), torch.randn(3, 4, 8, 8)


def mlp():
    """Make a model of two linear layers and a batch for it."""
    model = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 16, bias=False))
    return model, torch.randn(5, 32)


def boft(targets=("0", "2"), b=4, m=1, p=0.0, **options):
    """Make a BOFT config, by default with random parameters."""
    options = {"init_weights": False, **options}
    return peft.BOFTConfig(
        boft_block_size=b,
        boft_n_butterfly_factor=m,
        boft_dropout=p,
        target_modules=list(targets),
        **options,
    )


def oft(targets=("0", "2"), b=4, **options):
    """Make an OFT config, by default with random parameters and the exact Cayley transform."""
    options = {"init_weights": False, "use_cayley_neumann": False, **options}
    return peft.OFTConfig(r=0, oft_block_size=b, target_modules=list(targets), **options)


def tuned(base, config, **others):
    """Make a PEFT model on a copy of ``base``; further adapters are named by keyword."""
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for name, other in others.items():
        model.add_adapter(name, other)
    return model


def step(model, x, seed=7):
    """Run one step with a given seed; returns the output and every gradient by name."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    (y.float() * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {"x": x.grad, **grads}


def assert_same(got, want, rtol=1e-4, atol=1e-5):
    """Assert that two results of ``step`` agree."""
    torch.testing.assert_close(got[0], want[0], rtol=rtol, atol=atol)
    assert got[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        scale = max(1.0, grad.abs().max().item())
        torch.testing.assert_close(got[1][name], grad, rtol=rtol, atol=atol * scale, msg=name)
