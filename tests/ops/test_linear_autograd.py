"""boft_linear as a part of larger programs: autocast, changes in place, no_grad."""

import pytest
import torch
from linear_operands import D_IN, N, call, operands

from boft_ops import boft_linear
from boft_ops.ops import linear


@pytest.mark.parametrize("rows", [6, 100])
def test_autocast_in_backward_alone(rows):
    tensors = operands(dtype=torch.float32) | {"x": torch.randn(rows, D_IN)}
    tensors["skew"].requires_grad_()
    y = call(boft_linear, tensors)
    (want,) = torch.autograd.grad(y.sum(), tensors["skew"], retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(y.sum(), tensors["skew"], create_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        got.sum().backward()
    assert tensors["skew"].grad is not None


@pytest.mark.parametrize("leading", [(6,), (100,), (4, 30)])
def test_the_output_may_be_changed_in_place(leading):
    tensors = operands(dtype=torch.float32) | {"x": torch.randn(*leading, D_IN)}
    tensors["skew"].requires_grad_(), tensors["scale"].requires_grad_()
    trained = tensors["skew"], tensors["scale"]
    for without in ((), ("scale", "bias")):
        some = {k: v for k, v in tensors.items() if k not in without}
        got, want = (
            torch.autograd.grad(relu(call(boft_linear, some)).sum(), trained, allow_unused=True)
            for relu in (torch.relu_, torch.relu)
        )
        assert all(g is w or torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_no_outputs():
    tensors = operands(dtype=torch.float32)
    tensors["x"].requires_grad_()
    empty = {k: tensors[k][:0] for k in ("weight", "scale", "bias")}
    y = call(boft_linear, tensors | empty)
    y.sum().backward()
    assert y.shape == (N, 0)
    assert not tensors["x"].grad.any()


@pytest.mark.parametrize("rows", [6, 100])
def test_nothing_is_kept_for_a_trained_scale_without_grad(rows, monkeypatch):
    # float64, which the native call leaves to this Function
    tensors = operands(dtype=torch.float64) | {"x": torch.randn(rows, D_IN).double()}
    tensors["scale"].requires_grad_()
    needed = []
    forward = linear.RotatedLinear.forward

    def spy(ctx, *args):
        needed.append(ctx.needs_input_grad[2])
        return forward(ctx, *args)

    monkeypatch.setattr(linear.RotatedLinear, "forward", staticmethod(spy))
    with torch.no_grad():
        call(boft_linear, tensors)
    call(boft_linear, tensors)
    assert needed == [False, True]
