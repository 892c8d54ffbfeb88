"""Gradients in batches by torch's older vmap: is_grads_batched, jacobian(vectorize=True)."""

import peft
import pytest
import torch
from peft_models import boft, oft
from torch import nn
from torch.autograd.functional import jacobian

import boft_ops
from boft_ops._runtime import backend
from boft_ops.interop.peft import patched

W = torch.randn(8, 16)


def linear(method, side):
    def function(x, skew, scale, bias):
        return boft_ops.boft_linear(x, W, skew, scale, bias, side=side, method=method)

    features = 16 if side == "in" else 8
    skew = 0.1 * torch.randn(2, features // 4, 6)
    return function, torch.randn(2, 3, 16), skew, torch.randn(8), torch.randn(8)


def accelerated(config, base, x):
    with patched():
        model = peft.get_peft_model(nn.Sequential(base), config)
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def function(x, *parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    return function, x, *(model.get_parameter(name) for name in names)


CASES = {
    "cayley": lambda: (boft_ops.cayley, torch.randn(2, 4, 6)),
    "neumann5": lambda: (lambda q: boft_ops.cayley(q, method="neumann5"), torch.randn(2, 4, 6)),
    "butterfly_matmul": lambda: (
        lambda x, q: boft_ops.butterfly_matmul(x, boft_ops.cayley(q)),
        torch.randn(3, 16),
        torch.randn(2, 4, 6),
    ),
    "butterfly_groups": lambda: (
        lambda q: boft_ops.butterfly_groups([q])[0],
        torch.randn(2, 4, 6),
    ),
    "kaleidoscope": lambda: (
        lambda x, q: boft_ops.kaleidoscope_matmul(x, boft_ops.cayley(q), boft_ops.cayley(-2 * q)),
        torch.randn(3, 16),
        torch.randn(1, 2, 4, 6),
    ),
    "indexed": lambda: (
        lambda x, q: boft_ops.butterfly_matmul_indexed(
            x, boft_ops.cayley(q), torch.tensor([0, 1, 1])
        ),
        torch.randn(3, 16),
        torch.randn(2, 2, 4, 6),
    ),
    "linear in": lambda: linear("exact", "in"),
    "linear out": lambda: linear("exact", "out"),
    "neumann5 in": lambda: linear("neumann5", "in"),
    "neumann5 out": lambda: linear("neumann5", "out"),
    "peft boft": lambda: accelerated(boft(["0"], m=2), nn.Linear(16, 8), torch.randn(3, 16)),
    "peft oft": lambda: accelerated(oft(["0"]), nn.Linear(16, 8), torch.randn(3, 16)),
    "peft oft, default": lambda: accelerated(
        oft(["0"], use_cayley_neumann=True), nn.Linear(16, 8), torch.randn(3, 16)
    ),
    "peft boft of a convolution": lambda: accelerated(
        boft(["0"], m=2), nn.Conv2d(4, 8, 2), torch.randn(1, 4, 3, 3)
    ),
    "peft oft of a convolution": lambda: accelerated(
        oft(["0"]), nn.Conv2d(4, 8, 1), torch.randn(1, 4, 3, 3)
    ),
}


@pytest.mark.parametrize("forced", [None, "reference"])
@pytest.mark.parametrize("case", CASES)
def test_batched_gradients(case, forced):
    function, *inputs = CASES[case]()
    inputs = [x.detach().requires_grad_() for x in inputs]
    with backend.force(forced):
        y = function(*inputs)
        vectors = torch.randn(3, *y.shape)
        singly = [torch.autograd.grad(y, inputs, v, retain_graph=True) for v in vectors]
        batched = torch.autograd.grad(y, inputs, vectors, is_grads_batched=True)
        for got, *want in zip(batched, *singly, strict=True):
            torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-5)
        got = jacobian(function, tuple(inputs), vectorize=True)
        want = jacobian(function, tuple(inputs))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
