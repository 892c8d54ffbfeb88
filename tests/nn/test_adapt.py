"""adapt and merge on whole models: names, sharing, traps, all or nothing."""

import pytest
import torch
from torch import nn

from boft_ops import BOFTConv2d, BOFTLinear, OFTLinear, adapt, load_adapter, merge, save_adapter
from boft_ops.interop.serve import load_adapters


class Attention(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.out = nn.Linear(d, d)

    def forward(self, x):
        return self.out(self.q_proj(x) * self.k_proj(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.conv = nn.ConvTranspose1d(16, 16, 1)
        self.classifier = nn.Linear(16, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.classifier(x)


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def randomise(model):
    for name, p in model.named_parameters():
        if name.endswith(("skew", "scale_offset")):
            nn.init.normal_(p, std=0.2)
    return model


def adapted_names(model):
    return {n for n, m in model.named_modules() if isinstance(m, BOFTLinear)}


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (["q_proj"], {"layers.0.q_proj", "layers.1.q_proj"}),
        (["layers.1.out", "k_proj"], {"layers.1.out", "layers.0.k_proj", "layers.1.k_proj"}),
        (r"layers\.0\..*", {"layers.0.q_proj", "layers.0.k_proj", "layers.0.out"}),
        (r".*\.(out|q_proj)", {f"layers.{i}.{n}" for i in (0, 1) for n in ("out", "q_proj")}),
        (("classifier",), {"classifier"}),
    ],
)
def test_target_modules(target, names):
    model = Model()
    x = torch.randn(2, 16)
    y = model(x)
    assert adapt(model, target, block_size=4) is model
    assert adapted_names(model) == names
    assert trainable(model) == {f"{n}.{p}" for n in names for p in ("skew", "scale_offset")}
    assert torch.equal(model(x), y)


def test_options_reach_the_layers():
    model = adapt(
        Model(), ["out"], block_size=2, n_factors=3, side="out", scale=False, p_block=0.5,
        p_component=1.0, method="neumann5",
    )  # fmt: skip
    assert model.layers[0].out.options() == {
        "block_size": 2,
        "n_factors": 3,
        "side": "out",
        "scale": False,
        "p_component": 1.0,
        "p_block": 0.5,
        "method": "neumann5",
    }


def test_modules_to_save_stay_trainable():
    model = adapt(Model(), ["q_proj"], block_size=4, modules_to_save=["classifier"])
    assert {"classifier.weight", "classifier.bias"} < trainable(model)
    assert "layers.0.out.weight" not in trainable(model)


def test_merge_gives_back_plain_layers():
    model = Model()
    shapes = {n: type(m) for n, m in model.named_modules()}
    adapt(model, ["q_proj", "out"], block_size=4)
    randomise(model).eval()
    x = torch.randn(4, 16)
    y = model(x)
    assert merge(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == shapes
    torch.testing.assert_close(model(x), y)
    assert not trainable(model)
    with pytest.raises(ValueError, match="model: expected at least one BOFT layer, got none"):
        merge(model)


def test_merge_of_a_layer_and_of_a_merged_one():
    layer = randomise(BOFTLinear(16, 8)).eval()
    x = torch.randn(3, 16)
    y = layer(x)
    plain = merge(layer)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), y)
    torch.testing.assert_close(merge(layer.merge())(x), y)


def test_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, (1, 2)))
    x = torch.randn(2, 3, 6, 6)
    adapt(model, ["2"], block_size=8)
    assert isinstance(model[2], BOFTConv2d)
    randomise(model).eval()
    y = model(x)
    merge(model)
    assert type(model[2]) is nn.Conv2d
    torch.testing.assert_close(model(x), y)


def test_a_layer_under_two_names_is_adapted_once():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.ReLU()})
    model["c"] = model["a"]
    adapt(model, ["a"], block_size=4)
    assert model["a"] is model["c"]
    assert isinstance(model["c"], BOFTLinear)
    randomise(model).eval()
    merge(model)
    assert model["a"] is model["c"]
    assert type(model["a"]) is nn.Linear


def test_tied_weights_are_not_corrupted_by_merging():
    embedding, head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    before = embedding.weight.detach().clone()
    adapt(model, ["1"], block_size=4)
    randomise(model).eval()
    merge(model)
    assert torch.equal(embedding.weight, before)
    assert not torch.equal(model[1].weight, before)


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Renamed(nn.Linear):
    """A subclass that adds nothing to the forward pass: safe to replace."""


def test_subclasses():
    model = nn.ModuleDict({"same": OwnForward(4, 4, 2), "named": Renamed(8, 8)})
    adapt(model, ["named"], block_size=4)
    assert isinstance(model["named"], BOFTLinear)
    with pytest.raises(
        TypeError, match=r"same: expected a plain Conv2d, got OwnForward.*forward\(\)"
    ):
        adapt(nn.ModuleDict({"same": OwnForward(4, 4, 2)}), ["same"], block_size=4)


def test_layers_whose_parents_bypass_them():
    """Attention and its fast path read the weights of these layers without calling them."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32)
    for name in ("linear1", "self_attn.out_proj"):
        with pytest.raises((ValueError, TypeError), match=f"target_modules: '{name}'"):
            adapt(encoder, [name], block_size=4)


def test_errors_leave_the_model_untouched():
    model = Model()
    model.layers[1].out = nn.Linear(16, 16)
    model.odd = nn.Linear(15, 16)
    before = {n: (type(m), id(m)) for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    bad = [
        (["q_proj", "odd"], {}, ValueError, "odd: block_size: expected a divisor of 15"),
        (["q_proj", "nothing"], {}, ValueError, r"\['nothing'\] without a match.*q_proj"),
        (["q_proj", "conv"], {}, TypeError, "'conv' is ConvTranspose1d$"),
        (["q_proj"], {"side": "left"}, ValueError, "side: expected one of"),
        (["q_proj"], {"rank": 4}, TypeError, "rank"),
        (["q_proj"], {"modules_to_save": ["head"]}, ValueError, "modules_to_save: expected names"),
        (["q_proj"], {"modules_to_save": ["q_proj"]}, ValueError, "also in target_modules"),
        ([], {}, ValueError, "target_modules: expected at least one name"),
        ([1], {}, TypeError, "target_modules: expected a string or a list of names"),
        ("", {}, ValueError, "target_modules"),
        (r"[", {}, ValueError, "target_modules: expected a regular expression"),
    ]
    for target, options, error, match in bad:
        with pytest.raises(error, match=match):
            adapt(model, target, **{"block_size": 8, **options})
        assert {n: (type(m), id(m)) for n, m in model.named_modules()} == before
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_adapting_a_layer_twice_is_an_error():
    model = adapt(Model(), ["q_proj"], block_size=4)
    with pytest.raises(ValueError, match=r"'.*q_proj' is adapted already"):
        adapt(model, ["q_proj", "out"], block_size=4)


def test_a_bare_layer_is_not_a_model():
    with pytest.raises(ValueError, match="target_modules"):
        adapt(nn.Linear(8, 8), ["weight"])


def test_lazily_built_layers_are_refused():
    with pytest.raises(ValueError, match=r"0: .*got LazyLinear without a shape"):
        adapt(nn.Sequential(nn.LazyLinear(8)), ["0"])


def test_oft_layers_count_as_adapted():
    with pytest.raises(ValueError, match="'0' is adapted already"):
        adapt(nn.Sequential(OFTLinear(8, 8), nn.Linear(8, 8)), ["0"])


def test_tied_weights_are_not_trained_under_a_rotation():
    model = nn.ModuleDict({"emb": nn.Embedding(16, 8), "head": nn.Linear(8, 16, bias=False)})
    model["head"].weight = model["emb"].weight
    with pytest.raises(ValueError, match="'emb' shares a parameter with 'head'"):
        adapt(model, ["head"], modules_to_save=["emb"])
    assert type(model["head"]) is nn.Linear
    adapt(model, ["head"], block_size=4)


@pytest.mark.parametrize("function", [adapt, merge, save_adapter, load_adapter, load_adapters])
def test_what_is_no_model(function):
    for model in (None, "model"):
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got"):
            function(model, {}) if function is not merge else merge(model)


def test_names_of_a_wrong_type():
    for names in (None, 3):
        with pytest.raises(TypeError, match="target_modules: expected a string or a list of names"):
            adapt(nn.Sequential(nn.Linear(8, 8)), names)


@pytest.mark.parametrize("kind", [BOFTLinear, BOFTConv2d])
def test_dtypes_that_no_rotation_has(kind):
    with pytest.raises(TypeError, match=r"dtype: expected a dtype of float64.*complex64"):
        kind(8, 8, *[1] * (kind is BOFTConv2d), dtype=torch.complex64)


def test_modules_to_save_must_not_hold_a_target():
    def model():
        inner = nn.Sequential(nn.Linear(8, 8))
        return nn.ModuleDict({"enc": inner, "alias": inner[0]})

    for kept in (["enc"], ["alias"]):
        with pytest.raises(ValueError, match="also in target_modules"):
            adapt(model(), [r"enc.0"], modules_to_save=kept, block_size=4)
    saved = adapt(Model(), ["q_proj"], block_size=4, modules_to_save="classifier")
    assert "classifier.bias" in trainable(saved)


def test_loading_a_merged_state_leaves_tied_weights_alone():
    def tied():
        model = nn.ModuleDict({"e": nn.Embedding(8, 8), "h": nn.Linear(8, 8, bias=False)})
        model["h"].weight = model["e"].weight
        return adapt(model, ["h"], block_size=4)

    torch.manual_seed(1)
    model, other = tied(), tied()
    nn.init.normal_(other["h"].skew)
    other["h"].merge()
    state = {k: v for k, v in other.state_dict().items() if not k.startswith("e.")}
    before = model["e"].weight.clone()
    model.load_state_dict(state, strict=False)
    assert torch.equal(model["e"].weight, before)
    torch.testing.assert_close(model["h"].weight, other["h"].weight)
