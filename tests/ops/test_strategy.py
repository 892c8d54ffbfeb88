"""The strategy of a rotated layer, as on a GPU with Triton: kernels run in the interpreter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from boft_ops import boft_linear
from boft_ops._runtime import backend as backends
from boft_ops._runtime import tuned
from boft_ops._runtime.tuned import Choice, pinned
from boft_ops.ops import linear
from boft_ops.ops.rotated_linear import rotated_linear_backward, rotated_linear_forward

if not backends.has_triton():
    pytest.skip("triton is not installed", allow_module_level=True)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for op in backends.ops().values():
        backend = "triton" if "triton" in op.kernels else "reference"
        monkeypatch.setitem(op.defaults, "cpu", Choice(backend))
    tuned.forget()
    yield
    tuned.forget()


@pytest.fixture
def launched(monkeypatch):
    """The rows of each call of rotated_linear."""
    calls, right = [], rotated_linear_forward.launcher()
    monkeypatch.setattr(
        rotated_linear_forward,
        "launcher",
        lambda: lambda x, *a: calls.append(len(x)) or right(x, *a),
    )
    return calls


def operands(rows=5, **more):
    torch.manual_seed(0)
    x = torch.randn(rows, 32, requires_grad=True)
    skew = (0.3 * torch.randn(2, 4, 28)).requires_grad_()
    scale = torch.randn(8).requires_grad_()
    return {"x": x, "weight": torch.randn(8, 32), "skew": skew, "scale": scale} | more


def step(**tensors):
    y = boft_linear(**tensors)
    leaves = [t for t in tensors.values() if t is not None and t.requires_grad]
    return y, *torch.autograd.grad(y.square().sum(), leaves)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"bias": torch.randn(8)},
        {"bias": torch.randn(8, requires_grad=True)},
        {"scale": None},
        {"scale": torch.randn(8)},  # frozen
        {"x": torch.randn(5, 32)},
        {"x": torch.randn(2, 3, 32, requires_grad=True)},
        {"skew": 0.3 * torch.randn(2, 4, 28)},
    ],
    ids=["scale", "bias", "trained bias", "no scale", "frozen scale", "x", "dims", "frozen skew"],
)
def test_one_stage_is_launched_in_one_call(launched, more):
    tensors = operands(**more)
    ours = step(**tensors)
    assert len(launched) == 1
    with backends.force("reference"):
        torch.testing.assert_close(ours, step(**tensors), rtol=1e-4, atol=1e-4)
    assert len(launched) == 1


def test_a_decision_is_remembered_until_another_choice(launched, monkeypatch):
    seen, right = [], linear.layer_plan
    monkeypatch.setattr(linear, "layer_plan", lambda *a: seen.append(a) or right(*a))
    for _ in range(3):
        step(**operands())
    assert (len(seen), len(launched)) == (1, 3)
    for rows in range(6, 12):  # batches of ever new sizes
        step(**operands(rows=rows))
    assert len(seen) == 1
    step(**operands(rows=linear.MIN_ROWS))  # from here on another kernel may serve
    step(**operands(skew=operands()["skew"].detach()[:1].requires_grad_()))
    assert len(seen) == 3
    with pinned():
        step(**operands())
    step(**operands())
    assert len(seen) == 5


@pytest.mark.parametrize("op", ["rotate", "rotate_backward", "scale", "scale_backward"])
def test_a_part_that_was_measured_to_go_elsewhere_goes_there(launched, monkeypatch, op):
    calls, right = [], backends.ops()[op].reference
    monkeypatch.setattr(backends.ops()[op], "reference", lambda *a: calls.append(op) or right(*a))
    step(**operands())
    with pinned(**{op: Choice("triton")}):
        step(**operands())
    assert (len(launched), calls) == (2, [])
    with pinned(**{op: Choice("reference")}):
        step(**operands())
    assert (len(launched), calls) == (2, [op])
    # a measurement of the whole op counts for more
    whole = Choice("triton")
    with pinned(**{op: Choice("reference"), "rotated_linear": whole}):
        step(**operands())
    assert (len(launched), calls) == (3, [op])


def test_the_backward_goes_where_its_forward_goes():
    x, grad, weight = torch.randn(5, 32), torch.randn(5, 8), torch.randn(8, 32)
    stage = torch.randn(2, 16, 16)
    backward = grad, x, weight, stage, None, None, None, 1, False
    assert tuned.measured(rotated_linear_backward.tunable, x, backward) is None
    with pinned(rotated_linear=Choice("cuda")):
        assert (
            tuned.measured(rotated_linear_forward.tunable, x, (x, weight, stage)).backend == "cuda"
        )
        assert tuned.measured(rotated_linear_backward.tunable, x, backward).backend == "cuda"


def test_products_are_seen_by_whoever_counts_them(launched):
    step(**operands())
    with FlopCounterMode(display=False) as counter:
        step(**operands())
    assert counter.get_total_flops() >= 2 * 2 * 5 * 32 * 8
    assert len(launched) == 1
