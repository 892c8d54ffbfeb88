"""State dicts of adapted layers, and models that get their memory late."""

import pytest
import torch
from torch import nn

import boft_ops


def rotated():
    layer = boft_ops.BOFTLinear(16, 8, block_size=4)
    nn.init.normal_(layer.skew)
    return layer


def test_a_state_dict_says_nothing_of_a_plain_layer():
    """Loaders of pretrained weights into sharded models trip over keys that are no parameters."""
    layer, fresh = rotated(), rotated()
    assert layer.state_dict().keys() == dict(layer.named_parameters()).keys()
    assert layer.interpolate(1).state_dict()["_extra_state"].tolist() == [0, 1]
    fresh.load_state_dict(layer.state_dict())
    assert fresh.n_identity == 1
    state = layer.interpolate(0).state_dict()
    old = {**state, "_extra_state": torch.tensor([0, 0])}  # files of earlier versions have it
    assert fresh.load_state_dict(old).unexpected_keys == []
    assert fresh.n_identity == 0
    fresh.interpolate(1).load_state_dict(state)
    assert fresh.n_identity == 0
    fresh.eval().merge().load_state_dict(state)
    assert not fresh.merged


@pytest.mark.parametrize("kind", ["linear", "multi"])
def test_memory_after_the_meta_device_starts_as_the_identity(kind):
    """to_empty leaves what the memory held, here NaN, and no pretrained file has an adapter."""
    pretrained = nn.Sequential(nn.Linear(16, 8))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 8))
        if kind == "multi":
            model[0] = boft_ops.MultiAdapterLinear(model[0])
            model[0].add_adapter("a", block_size=4)
        else:
            boft_ops.adapt(model, ["0"], block_size=4)
    model.to_empty(device="cpu")
    base = model[0].base if kind == "multi" else model[0]
    base.load_state_dict(pretrained[0].state_dict(), strict=False)
    x = torch.randn(3, 16)
    torch.testing.assert_close(model(x), pretrained(x))
    for name, parameter in model.named_parameters():
        if name.endswith(("skew", "scale_offset")):
            nn.init.normal_(parameter)
    assert boft_ops.reset_adapters(model) is model
    torch.testing.assert_close(model(x), pretrained(x))
    with pytest.raises(ValueError, match="model: expected at least one BOFT layer"):
        boft_ops.reset_adapters(pretrained)
