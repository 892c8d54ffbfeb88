"""load_adapter reads every file that save_adapter writes; others are not written."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import boft_ops
from boft_ops.interop.serve import load_adapters


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TARGETS = ["blocks.0.0", "blocks.1.0"]


def adapt(model):
    return boft_ops.adapt(model, TARGETS, block_size=4, modules_to_save=["head"])


def trained(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def each_block(wrap):
    def wrapped(model):
        for i, block in enumerate(model.blocks):
            model.blocks[i] = wrap(block)
        return model

    return wrapped


def compiled(module):
    return torch.compile(module, backend="eager")


WRAPPERS = {
    "compiled": compiled,
    "compiled blocks": each_block(compiled),
    "AveragedModel": AveragedModel,
    "DataParallel": nn.DataParallel,
    "checkpoints": each_block(checkpoint_wrapper),
    "two": lambda model: nn.DataParallel(each_block(compiled)(model)),
}
NAMES = {f"{name}.{tensor}" for name in TARGETS for tensor in ("skew", "scale_offset")}
NAMES |= {"head.weight", "head.bias"}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_files_bear_the_names_of_the_pretrained_model(wrap, tmp_path):
    model, x = trained(adapt(Model())), torch.randn(4, 32)
    want = model(x)
    boft_ops.save_adapter(wrap(model), tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors").keys() == NAMES
    for fresh in (Model(), wrap(Model()), wrap(adapt(Model())), adapt(wrap(Model()))):
        loaded = boft_ops.load_adapter(fresh, tmp_path / "a.safetensors")
        torch.testing.assert_close(loaded.eval()(x), want)
    rotations = boft_ops.adapt(Model(), TARGETS, block_size=4)
    boft_ops.save_adapter(rotations, tmp_path / "b.safetensors")
    served = load_adapters(wrap(Model()), {"ann": tmp_path / "b.safetensors"})
    assert sum(isinstance(m, boft_ops.MultiAdapterLinear) for m in served.modules()) == 2


def test_a_layer_that_is_compiled_itself_is_refused():
    model = Model()
    model.head = compiled(model.head)
    with pytest.raises(ValueError, match=r"'head' is wrapped by torch\.compile"):
        boft_ops.adapt(model, ["head"], block_size=4)


def multi():
    layer = boft_ops.MultiAdapterLinear(nn.Linear(32, 32))
    layer.add_adapter("default")
    return layer


@pytest.mark.parametrize("make", [lambda: boft_ops.BOFTLinear(32, 32), multi])
@pytest.mark.parametrize("bare", [True, False])
def test_a_trained_weight_of_a_rotated_layer_is_not_saved(make, bare, tmp_path):
    model = make() if bare else nn.Sequential(make())
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"which no adapter file holds, got '(0\.)?weight'"):
        boft_ops.save_adapter(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    layer = model if bare else model[0]
    layer.weight.requires_grad_(False)
    boft_ops.save_adapter(model, tmp_path / "a.safetensors")
    boft_ops.load_adapter(make() if bare else nn.Sequential(make()), tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["blocks.0.0.skew", "blocks.1.0.scale_offset", "head.bias"])
def test_numbers_are_finite_in_files(name, value, tmp_path):
    model = adapt(Model())
    boft_ops.save_adapter(model, tmp_path / "a.safetensors")
    model.get_parameter(name).data.view(-1)[0] = value
    with pytest.raises(ValueError, match=f"{name}: expected numbers that are finite in"):
        boft_ops.save_adapter(model, tmp_path / "b.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    tensors[name].view(-1)[0] = value
    with boft_ops._runtime.files.open_safetensors(tmp_path / "a.safetensors") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "b.safetensors", metadata)
    for fresh in (Model(), adapt(Model())):
        before = {n: t.clone() for n, t in fresh.state_dict().items()}
        with pytest.raises(ValueError, match=f"{name}: expected numbers that are finite in"):
            boft_ops.load_adapter(fresh, tmp_path / "b.safetensors")
        assert all(torch.equal(t, before[n]) for n, t in fresh.state_dict().items())


def test_infinity_in_buffers_is_kept(tmp_path):
    model = adapt(Model())
    model.head.register_buffer("mask", torch.full((2,), -torch.inf))
    boft_ops.save_adapter(model, tmp_path / "a.safetensors")
    boft_ops.load_adapter(model, tmp_path / "a.safetensors")


def test_shards_are_refused(tmp_path):
    model = adapt(Model())
    model.blocks[0][0].skew.data = torch.empty(0)  # as ZeRO leaves it
    with pytest.raises(ValueError, match=r"blocks\.0\.0\.skew: expected a whole tensor"):
        boft_ops.save_adapter(model, tmp_path / "a.safetensors")
