"""Placeholders on the meta device are refused wherever numbers are read or written."""

import pytest
import torch
from torch import nn

import boft_ops
from boft_ops.interop.serve import load_adapters

REFUSED = "expected numbers, got a placeholder on the meta device"


def pretrained(device="cpu"):
    return nn.Sequential(
        nn.Linear(64, 64, device=device), nn.GELU(), nn.Linear(64, 64, device=device)
    )


def adapted(**options):
    return boft_ops.adapt(pretrained(), ["0", "2"], block_size=8, **options)


def offload(layer, *names):
    for name in names:
        layer._parameters[name] = nn.Parameter(layer._parameters[name].to("meta"))


@pytest.fixture
def file(tmp_path):
    model = adapted()
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.skew, std=0.3)
    boft_ops.save_adapter(model, tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def conv():
    return boft_ops.BOFTConv2d(8, 64, 1, block_size=8, n_factors=1), torch.randn(1, 8, 4, 4)


def linear(**options):
    return lambda: (boft_ops.BOFTLinear(64, 64, **options), torch.randn(128, 64))


def multi():
    layer = boft_ops.MultiAdapterLinear(nn.Linear(64, 64))
    layer.add_adapter("a", block_size=8)
    return layer, torch.randn(128, 64)


@pytest.mark.parametrize("name", ["skew", "scale_offset"])
@pytest.mark.parametrize(
    "make", [linear(), linear(side="out"), linear(kaleidoscope=1), conv, multi]
)
def test_a_forward_pass_and_merging_refuse_a_placeholder_beside_numbers(make, name):
    layer, x = make()
    offload(getattr(layer, "adapters", {"a": layer})["a"], name)
    reads = [lambda: layer(x), lambda: layer.weight.sum(), layer.merged_layer]
    if hasattr(layer, "adapters"):
        reads += [lambda: layer(x, torch.zeros(128, dtype=torch.int64)), layer.eval().prepare]
        reads = reads[:-1] if name == "scale_offset" else reads
    else:
        reads += [layer.merge, layer.merged_weight]
    for read in reads:
        with pytest.raises(ValueError, match=f"{name}: {REFUSED}"):
            read()
    assert not getattr(layer, "merged", False)


def test_offloaded_models_are_neither_loaded_nor_merged_nor_saved(file, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, x = adapted().eval(), torch.randn(3, 64)
    accelerate.cpu_offload(model, torch.device("cpu"))
    before = model(x)
    assert not model[0].frozen_weight.requires_grad
    for use in (
        lambda: boft_ops.load_adapter(model, file),
        lambda: boft_ops.save_adapter(model, tmp_path / "other.safetensors"),
        lambda: boft_ops.merge(model),
        lambda: boft_ops.unload(model),
        model[0].merge,
    ):
        with pytest.raises(ValueError, match=REFUSED):
            use()
    assert torch.equal(model(x), before)
    assert not (tmp_path / "other.safetensors").exists()


def test_loading_wants_the_pretrained_numbers_first(file):
    for load in (
        lambda model: boft_ops.load_adapter(model, file),
        lambda model: load_adapters(model, {"ann": file}),
    ):
        model = pretrained("meta")
        with pytest.raises(ValueError, match=REFUSED):
            load(model)
        assert type(model[0]) is nn.Linear
    part = adapted()
    offload(part[2], "skew")
    with pytest.raises(ValueError, match=rf"2\.skew: {REFUSED}"):
        boft_ops.load_adapter(part, file)
    assert not part[0].skew.any()


def test_a_model_that_is_all_on_meta_computes_shapes():
    x = torch.empty(3, 64, device="meta")
    for layer in (adapted().to("meta"), multi()[0].to("meta")):
        assert layer(x).shape == (3, 64)
