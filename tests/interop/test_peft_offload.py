"""Accelerated models with hooks: offloaded, sharded, and whose layers keep a bound forward."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft.tuners.boft import layer as peft_boft
from peft.tuners.oft.layer import OFTRotationModule
from peft_models import boft, mlp, net, oft, tuned
from torch.distributed.fsdp import fully_shard

from boft_ops.interop.peft import accelerate, patched, restore

CONVOLUTIONS = ("conv", "point", "hidden", "out")
CASES = {
    "boft": (mlp, boft(m=2)),
    "boft_conv": (net, boft(CONVOLUTIONS, b=2, m=2)),
    "oft": (mlp, oft()),
    "oft_neumann": (mlp, oft(use_cayley_neumann=True)),
    "oft_terms": (mlp, oft(use_cayley_neumann=True, num_cayley_neumann_terms=3)),
    "oft_coft": (mlp, oft(coft=True, eps=1e-2)),
    "oft_share": (mlp, oft(block_share=True)),
    "oft_conv": (net, oft(CONVOLUTIONS)),
}
OFT_CASES = [case for case in CASES if case.startswith("oft")]
pytestmark = pytest.mark.filterwarnings("ignore:boft_ops.*overlapping")


def made(case):
    """The accelerated model of a case, its input, and its output."""
    make, config = CASES[case]
    base, x = make()
    with patched():
        model = tuned(base, copy.deepcopy(config)).eval()
    return model, x, model(x).detach()


@pytest.mark.parametrize("case", CASES)
def test_an_offloaded_model_computes_the_same(case):
    model, x, want = made(case)
    cpu_offload(model, torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    for _ in range(2):
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        assert all(p.is_meta for p in model.parameters())
    torch.testing.assert_close(model.merge_and_unload()(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", OFT_CASES)
def test_an_offloaded_model_is_accelerated(case):
    make, config = CASES[case]
    base, x = make()
    model = tuned(base, copy.deepcopy(config)).eval()
    want = accelerate(copy.deepcopy(model))(x)
    cpu_offload(model, torch.device("cpu"))
    torch.testing.assert_close(accelerate(model)(x), want, rtol=1e-4, atol=1e-5)


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: getattr(g, "_local_tensor", g) for n, g in grads.items()}


@pytest.mark.parametrize("case", OFT_CASES)
def test_hooks_of_rotation_modules_run_in_each_forward(case):
    model, x, want = made(case)
    grads = gradients(model, x)
    calls = []
    rotations = [m for m in model.modules() if isinstance(m, OFTRotationModule)]
    for module in rotations:
        module.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert len(calls) == len(rotations)
    for name, grad in gradients(model, x).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-3, atol=1e-4)


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", ["oft", "oft_neumann"])
def test_sharded_rotation_modules(case, process_group):
    """FSDP2 gathers the numbers of a module before its forward."""
    model, x, want = made(case)
    grads = gradients(model, x)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for module in [m for m in model.modules() if isinstance(m, OFTRotationModule)]:
        fully_shard(module, mesh=mesh)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    for name, grad in gradients(model, x).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-3, atol=1e-4)


def test_a_layer_whose_forward_is_kept_is_not_restored():
    """A device hook keeps the bound forward of the accelerated class."""
    base, x = mlp()
    model = accelerate(tuned(base, boft()))
    y = model(x)
    add_hook_to_module(model.base_model.model[0], ModelHook())
    with pytest.warns(UserWarning, match=r"base_model\.model\.0: not restored, as its forward"):
        restore(model)
    assert type(model.base_model.model[2]) is peft_boft.Linear
    torch.testing.assert_close(model(x), y)
    remove_hook_from_module(model.base_model.model[0])
    # The removed hook leaves a bound forward behind, too: the layer goes on as it is.
    with pytest.warns(UserWarning, match="not restored"):
        restore(model)
    torch.testing.assert_close(model(x), y)
    del model.base_model.model[0].forward
    assert type(restore(model).base_model.model[0]) is peft_boft.Linear
    torch.testing.assert_close(model(x), y)
