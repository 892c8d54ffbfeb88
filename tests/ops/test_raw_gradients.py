"""Raw operators are differentiable, for exported graphs, which hold them and not the Functions."""

import copy

import pytest
import torch
from torch import nn

import boft_ops
from boft_ops._runtime import backend
from boft_ops._runtime.workload import Workload

WORKLOAD = Workload(rows=5, d=24, n=16, block_size=4, n_factors=2)


def floats(arguments):
    return [a for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point()]


def gradients(function, arguments):
    arguments = [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    result = function(*arguments)
    outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if y.requires_grad]
    torch.manual_seed(1)
    upstream = [torch.randn(y.shape, dtype=y.dtype) for y in outputs]
    return torch.autograd.grad(outputs, floats(arguments), upstream, allow_unused=True)


@pytest.mark.parametrize("name", backend.ops())
def test_gradient_of_a_raw_op_is_that_of_its_reference(name):
    op = backend.ops()[name]
    samples = list(op.samples(WORKLOAD))
    assert samples
    for arguments in samples:
        got, want = gradients(op.raw, arguments), gradients(op.reference, arguments)
        torch.testing.assert_close(got, want)
        assert any(g is not None and g.abs().max() > 0 for g in got)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"side": "out"},
        {"n_factors": 1, "block_size": 3},
        {"method": "neumann5", "n_factors": 3, "block_size": 2},
        {"kaleidoscope": 1},
        {"p_component": 0.5, "p_block": 0.5},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
def test_exported_layer_trains(options):
    model = nn.Sequential(nn.Linear(24, 48), nn.SiLU(), nn.Linear(48, 24))
    boft_ops.adapt(model, ["0", "2"], **{"block_size": 4, **options})
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.skew, std=0.2)
        nn.init.normal_(layer.scale_offset, std=0.1)
    exported = torch.export.export(copy.deepcopy(model), (torch.randn(8, 24),)).module()
    x, grads = torch.randn(8, 24), []
    for module in (model, exported):
        rows = x.clone().requires_grad_()
        torch.manual_seed(2)
        module(rows).square().sum().backward()
        named = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        grads.append({"x": rows.grad, **named})
    assert len(grads[0]) == 5
    torch.testing.assert_close(*grads)
