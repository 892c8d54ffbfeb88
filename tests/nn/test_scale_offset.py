"""The scale is stored as its offset from one, which casts and weight decay leave what it is."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import boft_ops
from boft_ops import BOFTConv2d, BOFTLinear, MultiAdapterLinear
from boft_ops.interop.convert import read_checkpoint

OFFSET = 0.003  # in bfloat16 1.003 is 1


def multi(**options):
    layer = MultiAdapterLinear(nn.Linear(64, 96))
    layer.add_adapter("a", block_size=8, **options)
    return layer


# BOFT(5, 4) has two stages, BOFT(2, 8) has one; only in float32 a native call serves the latter
LAYERS = {
    "in": lambda: BOFTLinear(64, 96, block_size=8),
    "stages": lambda: BOFTLinear(64, 96, block_size=4, n_factors=5),
    "out": lambda: BOFTLinear(64, 96, block_size=8, side="out"),
    "kaleidoscope": lambda: BOFTLinear(64, 96, block_size=8, kaleidoscope=1),
    "conv": lambda: BOFTConv2d(64, 96, 1, block_size=8),
    "multi": multi,
}


def adapter_of(layer):
    return layer.adapters["a"] if isinstance(layer, MultiAdapterLinear) else layer


def rows_for(layer, dtype):
    torch.manual_seed(1)
    x = torch.randn(512, 64).to(dtype)
    return x[:, :, None, None] if isinstance(layer, BOFTConv2d) else x


@pytest.mark.parametrize("kind", LAYERS)
def test_a_small_offset_outlives_a_cast_to_bfloat16(kind):
    """The forward pass and merging both scale by 1.003, on average over rounded numbers."""
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    nn.init.normal_(adapter_of(layer).skew, std=0.1)
    nn.init.constant_(adapter_of(layer).scale_offset, OFFSET)
    layer.bfloat16().eval()
    own = adapter_of(layer)
    assert own.scale_offset.dtype == torch.bfloat16
    assert own.scale.dtype == torch.float32
    torch.testing.assert_close(own.scale - 1, torch.full((96,), OFFSET), rtol=0.0025, atol=0)
    unscaled = copy.deepcopy(layer)
    nn.init.zeros_(adapter_of(unscaled).scale_offset)
    x = rows_for(layer, torch.bfloat16)
    runs = [own(x).detach().double() for own in (layer, unscaled)]
    bias = layer.bias.detach().double()
    bias = bias[:, None, None] if kind == "conv" else bias
    scaled, plain = (y - bias for y in runs)
    assert (scaled * plain).sum() / plain.square().sum() - 1 == pytest.approx(OFFSET, rel=0.1)
    weights = [own.merged_layer().weight.detach().double() for own in (layer, unscaled)]
    got = (weights[0] * weights[1]).sum() / weights[1].square().sum() - 1
    assert got == pytest.approx(OFFSET, rel=0.1)
    merged = layer.merged_layer()
    exact = copy.deepcopy(merged).double()
    exact.weight = copy.deepcopy(layer).double().merged_layer().weight
    truth = exact(x.double())
    errors = [(y.double() - truth).norm() for y in (layer(x), merged(x))]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("rows", [3, 200])  # separate kernels, and the fused one
def test_an_offset_and_a_scale_are_one_layer(rows):
    """Values and gradients, also of second order, equal those of ``boft_linear`` with the sum."""
    torch.manual_seed(0)
    layer = BOFTLinear(64, 96, block_size=8)
    nn.init.normal_(layer.skew, std=0.1)
    nn.init.normal_(layer.scale_offset, std=0.3)
    x, grad = torch.randn(rows, 64, requires_grad=True), torch.randn(rows, 96)
    scale = layer.scale.detach().requires_grad_()
    arguments = x, layer.frozen_weight, layer.skew, scale, layer.bias
    results = []
    for y, s in ((layer(x), layer.scale_offset), (boft_ops.boft_linear(*arguments), scale)):
        firsts = torch.autograd.grad(y, (x, layer.skew, s), grad, retain_graph=True)
        second = torch.autograd.grad(y, s, grad, create_graph=True)[0].square().sum()
        results.append((y, *firsts, *torch.autograd.grad(second, (x, layer.skew))))
    torch.testing.assert_close(*results)


def test_the_gradient_of_the_property_is_that_of_the_parameter():
    layer = BOFTLinear(64, 96)
    (layer.scale * torch.arange(96)).sum().backward()
    assert torch.equal(layer.scale_offset.grad, torch.arange(96).float())
    assert BOFTLinear(64, 96, scale=False).scale is None
    for value in (nn.Parameter(torch.ones(96)), torch.ones(96), None):
        with pytest.raises((AttributeError, KeyError), match="scale"):
            layer.scale = value


def test_weight_decay_pulls_to_the_pretrained_layer():
    layer = BOFTLinear(64, 96)
    nn.init.normal_(layer.skew, std=0.1)
    nn.init.normal_(layer.scale_offset, std=0.3)
    x = torch.randn(5, 64)
    pretrained = nn.functional.linear(x, layer.frozen_weight, layer.bias)
    trained = [layer.skew, layer.scale_offset]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.5)
    distances = []
    for _ in range(30):
        optimizer.step()
        distances.append((layer(x) - pretrained).norm().item())
    assert distances == sorted(distances, reverse=True)
    torch.testing.assert_close(layer(x), pretrained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["in", "conv", "multi"])
def test_a_state_dict_with_a_scale_is_refused(kind):
    layer = LAYERS[kind]()
    state = layer.state_dict()
    (name,) = (name for name in state if name.endswith("scale_offset"))
    state[name.removesuffix("_offset")] = 1 + state.pop(name)
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"scale: expected .*scale_offset, which is the scale"):
            layer.load_state_dict(state, strict=strict)


def saved_as_version_1(path, model):
    """The file that the first format version had for an adapted model."""
    boft_ops.save_adapter(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format_version"] == "2"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("scale_offset")]:
        prefix = name.removesuffix("scale_offset")
        tensors[f"{prefix}scale"] = tensors.pop(name) + 1
    save_file(tensors, path, metadata | {"format_version": "1"})


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def test_files_of_the_first_version_give_the_same_layer(tmp_path):
    """A file is read by every later version: the scales come back as they were."""
    tuned = boft_ops.adapt(model(), ["0", "2"], block_size=4)
    for layer in (tuned[0], tuned[2]):
        nn.init.normal_(layer.skew, std=0.2)
        nn.init.normal_(layer.scale_offset, std=0.1)
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    saved_as_version_1(old, tuned)
    boft_ops.save_adapter(tuned, new)
    assert "0.scale" in load_file(old)
    assert "0.scale_offset" in load_file(new)
    again = boft_ops.load_adapter(model(), old)
    for i in (0, 2):
        assert torch.equal(again[i].scale, load_file(old)[f"{i}.scale"])
        assert torch.equal(again[i].scale, tuned[i].scale)
    merged = boft_ops.merge_adapters([old, new])
    torch.testing.assert_close(merged.tensors["0.scale_offset"], tuned[0].scale_offset.data)
    for path in (old, new):
        assert torch.equal(read_checkpoint(path).layers["0"].scale, tuned[0].scale)
    boft_ops.save_adapter(again, old)
    with safe_open(old, "pt") as file:
        assert file.metadata()["format_version"] == "2"
        assert set(json.loads(file.metadata()["layers"])) == {"0", "2"}


def test_half_a_strength_of_a_small_offset():
    layer = BOFTLinear(64, 96).eval()
    nn.init.constant_(layer.scale_offset, 1e-4)
    offset = layer.set_strength(0.5).at_strength()[1]
    torch.testing.assert_close(offset, torch.full((96,), 1.0001**0.5 - 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("version", "key"), [("1", "scale"), ("2", "scale_offset")])
def test_a_file_whose_scale_is_made_of_integers_is_refused(tmp_path, version, key):
    path = tmp_path / "a.safetensors"
    boft_ops.save_adapter(boft_ops.adapt(model(), ["0"], block_size=4), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"format_version": version}
    tensors = load_file(path)
    (name,) = (name for name in tensors if name.endswith("scale_offset"))
    tensors[name.replace("scale_offset", key)] = tensors.pop(name).int()
    save_file(tensors, path, metadata)
    for read in (lambda: boft_ops.load_adapter(model(), path), lambda: read_checkpoint(path)):
        with pytest.raises(ValueError, match=rf"{key}: expected float64, .*, got torch.int32"):
            read()


def test_a_file_of_version_1_with_an_offset_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    boft_ops.save_adapter(boft_ops.adapt(model(), ["0"], block_size=4), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"format_version": "1"}
    tensors = load_file(path)
    tensors["0.scale"] = torch.ones_like(tensors["0.scale_offset"])
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"0\.scale_offset: expected format version 2 of a file"):
        boft_ops.load_adapter(model(), path)
