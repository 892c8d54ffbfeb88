"""Options for each layer, "all-linear", a second adapt, and the way back."""

import pytest
import torch
from torch import nn

import boft_ops
from boft_ops import BOFTConv2d, BOFTLinear, MultiAdapterLinear


def pretrained():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 44), nn.GELU(), nn.Linear(44, 8)]
    return nn.Sequential(*layers)


def train(model):
    for module in model.modules():
        if hasattr(module, "skew"):
            nn.init.normal_(module.skew, std=0.3)
    return model


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_mapping_gives_layers_options_of_their_own():
    options = {"0": {"block_size": 16}, r"[24]": {"n_factors": 1, "scale": False}}
    model = boft_ops.adapt(pretrained(), options, block_size=4, method="neumann5")
    for name, b, m, scale in ((0, 16, 2, True), (2, 4, 1, False), (4, 4, 1, False)):
        layer = model[name]
        assert (layer.block_size, layer.n_factors, layer.method) == (b, m, "neumann5")
        assert (layer.scale_offset is not None) == scale


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ({"0": {"block_size": 8}, ".*": {}}, ValueError, "one choice of options for '0'"),
        ({"0": 8}, TypeError, "expected options for '0', got 8"),
        ({"7": {}}, ValueError, "without a match"),
        ({"0": {"blocks": 8}}, TypeError, "blocks"),
        ({}, ValueError, "at least one name"),
    ],
)
def test_mappings_that_make_no_sense_leave_the_model(targets, error, message):
    model = pretrained()
    with pytest.raises(error, match=message):
        boft_ops.adapt(model, targets, block_size=4)
    assert all(type(model[i]) is nn.Linear for i in (0, 2, 4))
    assert all(p.requires_grad for p in model.parameters())


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = pretrained()
        self.conv = nn.Conv2d(4, 4, 1)
        self.score, self.lm_head = nn.Linear(8, 2), nn.Linear(8, 16)

    def get_output_embeddings(self):
        return self.lm_head


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_all_linear_leaves_out_the_head_and_what_is_saved(wrap):
    model = Language()
    boft_ops.adapt(wrap(model), "all-linear", modules_to_save=["score"], block_size=4, n_factors=1)
    adapted = {name for name, module in model.named_modules() if isinstance(module, BOFTLinear)}
    assert adapted == {"body.0", "body.2", "body.4"}
    assert type(model.conv) is nn.Conv2d


def test_a_second_adapt_adds_layers_and_freezes_nothing_that_is_trained():
    model = boft_ops.adapt(pretrained(), ["0"], block_size=8, modules_to_save=["2"])
    model[0].bias.requires_grad_(True)
    before = trainable(model)
    assert before == {"0.skew", "0.scale_offset", "0.bias", "2.weight", "2.bias"}
    with pytest.raises(ValueError, match="'0' is adapted already"):
        boft_ops.adapt(model, ["0", "4"], block_size=4)
    assert trainable(model) == before
    boft_ops.adapt(model, ["4"], block_size=4, n_factors=1)
    assert trainable(model) == before | {"4.skew", "4.scale_offset"}
    boft_ops.adapt(model, "all-linear", block_size=4, n_factors=1)  # the rest
    assert isinstance(model[2], BOFTLinear)


@pytest.mark.parametrize("merged", [None, True, False])
def test_unload_brings_the_pretrained_model_back(merged, tmp_path):
    original, x = pretrained(), torch.randn(3, 64)
    file = tmp_path / "b.safetensors"
    other = train(boft_ops.adapt(pretrained(), ["0", "4"], block_size=4, n_factors=1))
    boft_ops.save_adapter(other, file)
    model = train(boft_ops.adapt(pretrained(), ["0", "2"], block_size=4)).eval()
    weight = model[0].frozen_weight
    if merged is not None:
        model[0].merge(keep=merged)
    assert boft_ops.unload(model) is model
    assert [type(layer) for layer in model] == [type(layer) for layer in original]
    torch.testing.assert_close(model(x), original(x))
    if merged is not False:
        assert model[0].weight is weight
        assert torch.equal(model(x), original(x))
    torch.testing.assert_close(boft_ops.load_adapter(model, file)(x), other(x))
    with pytest.raises(ValueError, match="at least one BOFT layer"):
        boft_ops.unload(original)


def test_unload_of_convolutions_served_and_bare_layers():
    conv = nn.Conv2d(8, 6, 3, stride=2, padding=1)
    layer = train(BOFTConv2d.from_conv(conv, block_size=4, n_factors=1))
    image = torch.randn(1, 8, 5, 5)
    assert torch.equal(boft_ops.unload(layer)(image), conv(image))
    base = nn.Linear(64, 8)
    model = nn.Sequential(MultiAdapterLinear(base))
    assert boft_ops.unload(model)[0] is base


def test_a_layer_that_cannot_be_unmerged_leaves_the_model():
    model = train(boft_ops.adapt(pretrained(), ["0", "2"], block_size=4)).eval()
    nn.init.constant_(model[2].scale_offset, -1)
    model[2].merge(keep=False)
    with pytest.raises(ValueError, match="scale: expected no zero"):
        boft_ops.unload(model)
    assert isinstance(model[0], BOFTLinear)
    assert model[2].merged
