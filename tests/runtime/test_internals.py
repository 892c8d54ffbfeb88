"""Private parts of torch: each does what the package expects of it, or a test of its name fails."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import boft_ops
from boft_ops._runtime import internals

PACKAGE = Path(boft_ops.__file__).parent


def test_torchs_private_names_stand_in_one_file():
    naming = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if re.search(
            r"torch\._C\.|_dynamo_marked_constant|_composable_state\b|\._handle\b", path.read_text()
        )
        and "triton_kernels" not in path.parts  # kernels import nothing of the package
    }
    assert naming == {"internals.py"}


def test_tracing_state():
    seen = []

    def function(x):
        seen.append(internals.tracing_state() is not None)
        return x + 1

    function(torch.ones(2))
    torch.jit.trace(function, torch.ones(2), check_trace=False)
    assert seen == [False, True]


def test_n_dispatch_modes():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert internals.n_dispatch_modes() == 0
    with Mode():
        assert internals.n_dispatch_modes() == 1


def test_n_function_modes():
    assert internals.n_function_modes() == 0
    with torch.overrides.TorchFunctionMode():
        assert internals.n_function_modes() == 1


def test_has_transforms():
    seen = []
    torch.func.vmap(lambda x: seen.append(internals.has_transforms()) or x)(torch.ones(2))
    assert seen == [True]
    assert not internals.has_transforms()


def test_is_legacy_batched():
    seen = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(internals.is_legacy_batched(grad))
            return grad

    x = torch.ones(2, requires_grad=True)
    y = Function.apply(x)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [True, False]


def test_saved_tensor_hooks():
    # not in every torch: then the package saves what hooks could look at
    assert not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks") or (
        internals.saved_tensor_hooks(True) is None
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert internals.saved_tensor_hooks(True) is not None


def test_is_any_autocast_enabled():
    assert not internals.is_any_autocast_enabled()
    with torch.autocast("cpu"):
        assert internals.is_any_autocast_enabled()


@pytest.mark.parametrize("retain_graph", [False, True])
def test_keeps_graph(retain_graph):
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda grad: seen.append(internals.keeps_graph()))
    y.sum().backward(retain_graph=retain_graph)
    assert seen == [retain_graph]


def test_below_autograd():
    x = torch.ones(2, requires_grad=True)
    with internals.BelowAutograd():
        assert not (2 * x).requires_grad
    assert (2 * x).requires_grad


def test_undispatched():
    add = internals.undispatched(torch.ops.aten.add.Tensor, "cpu")
    x = torch.ones(2, requires_grad=True)
    assert torch.equal(add(x, x), torch.full((2,), 2.0))
    assert not add(x, x).requires_grad


def test_level_of_forward_differentiation():
    assert forward_ad._current_level < 0
    with forward_ad.dual_level():
        assert forward_ad._current_level >= 0


def test_no_torch_function():
    class Tensor(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "seen"

    x = torch.ones(2).as_subclass(Tensor)
    assert torch.add(x, 1) == "seen"
    with internals.NoTorchFunction():
        assert torch.equal(torch.add(x, 1), torch.tensor([2.0, 2.0]))


def test_constant_in_graphs():
    marked = internals.constant_in_graphs(lambda: 1)
    assert vars(marked) == vars(torch.compiler.assume_constant_result(lambda: 1))


def test_composable_states(monkeypatch):
    from torch.distributed import _composable_state

    class State(_composable_state._State):
        pass

    module, state = nn.Linear(2, 2), State()
    before = len(internals.composable_states())
    _composable_state._insert_module_state(module, state)
    assert len(internals.composable_states()) == before + 1
    assert internals.composable_states()[module]() is state
    monkeypatch.delitem(torch.sys.modules, "torch.distributed._composable_state")
    assert len(internals.composable_states()) == 0
