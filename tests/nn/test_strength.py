"""The strength of an adapter: powers of rotations and scales, exact at 0 and 1."""

import copy
import math

import pytest
import torch
from torch import nn

import boft_ops
from boft_ops import BOFTConv2d, BOFTLinear, MultiAdapterLinear, adapt, cayley, set_strength
from boft_ops.nn import powers

LAYERS = {
    "in": lambda: BOFTLinear(32, 16),
    "out": lambda: BOFTLinear(16, 32, side="out"),
    "oft": lambda: BOFTLinear(30, 16, block_size=5, n_factors=1, scale=False),
    "kaleidoscope": lambda: BOFTLinear(32, 16, kaleidoscope=1),
    "neumann5": lambda: BOFTLinear(32, 16, method="neumann5"),
    "conv": lambda: BOFTConv2d(8, 16, 2),
    "multi": lambda: with_adapters(32, 16),
}


def with_adapters(d, n):
    layer = MultiAdapterLinear(nn.Linear(d, n))
    layer.add_adapter("ann")
    layer.add_adapter("bob", n_factors=1)
    return layer


def randomized(module, std=0.2):
    for name, parameter in module.named_parameters():
        if name.endswith("skew"):
            nn.init.normal_(parameter, std=std)
        if name.endswith("scale_offset"):
            nn.init.uniform_(parameter, -0.5, 1)
    return module


def make(kind, dtype=torch.float64):
    torch.manual_seed(0)
    layer = randomized(LAYERS[kind]().to(dtype)).eval()
    x = torch.randn(3, 8, 5, 5) if kind == "conv" else torch.randn(4, layer.in_features)
    return layer, x.to(dtype)


def pretrained(layer, x):
    base = layer.base if isinstance(layer, MultiAdapterLinear) else layer.pretrained_layer()
    return base(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_ends_are_exact(kind, dtype):
    layer, x = make(kind, torch.float32)
    base = layer.base if kind == "multi" else layer
    for name, parameter in base.named_parameters():
        if name.endswith(("weight", "bias")):
            parameter.data = parameter.data.to(dtype)
    x = x.to(dtype)
    if kind == "conv":
        layer.to(dtype)
    before = layer(x)
    assert not torch.equal(before, pretrained(layer, x))
    assert set_strength(layer, 0) is layer
    assert torch.equal(layer(x), pretrained(layer, x))
    set_strength(layer, 0.5)
    assert not torch.equal(layer(x), before)
    set_strength(layer, 1)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", ["in", "out", "oft", "conv"])
def test_two_halves_are_the_whole(kind):
    """With blocks R^(1/2) applied twice each factor is R again, and so are the scales."""
    layer, _ = make(kind)
    skew, offset = layer.set_strength(0.5).at_strength()
    half = cayley(skew)
    torch.testing.assert_close(half @ half, cayley(layer.skew))
    if offset is not None:
        torch.testing.assert_close((1 + offset) ** 2, layer.scale)
    layer.set_strength(-1)
    torch.testing.assert_close(cayley(layer.at_strength()[0]), cayley(layer.skew).mT)
    layer.set_strength(2)
    torch.testing.assert_close(
        cayley(layer.at_strength()[0]), cayley(layer.skew) @ cayley(layer.skew)
    )


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "multi"])
def test_all_readers_agree(kind):
    """forward, weight, merged_weight, merge and unmerge have one strength."""
    layer, x = make(kind)
    layer.set_strength(0.4)
    y = layer(x)
    torch.testing.assert_close(torch.clone(layer.weight), layer.merged_weight())
    pretrained_weight = layer.frozen_weight.clone()
    layer.merge(keep=False)
    torch.testing.assert_close(layer(x), y)
    with pytest.raises(RuntimeError, match="set_strength: expected an unmerged layer"):
        layer.set_strength(1)
    twin = copy.deepcopy(layer).unmerge()
    torch.testing.assert_close(twin.frozen_weight, pretrained_weight)
    other = make(kind)[0]
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), y)
    torch.testing.assert_close(other.unmerge().frozen_weight, pretrained_weight)
    torch.testing.assert_close(other(x), y)


def test_adapters_have_strengths_of_their_own():
    layer, x = make("multi")
    ann, bob = layer.adapters["ann"], layer.adapters["bob"]
    layer.set_active("bob")
    only_bob = layer(x)
    layer.set_active(["ann", "bob"])
    both = layer(x)
    set_strength(layer, 0, adapter="ann")
    assert (ann.strength, bob.strength) == (0, 1)
    torch.testing.assert_close(layer(x), only_bob)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), only_bob)
    torch.testing.assert_close(layer.merged_layer()(x), only_bob)
    set_strength(layer, 1)
    assert torch.equal(layer(x), both)


@pytest.mark.parametrize("is_prepared", [False, True])
def test_rows_with_strengths(is_prepared):
    layer, x = make("multi")
    index = layer.index_of(["ann", "bob", None, "ann"])
    if is_prepared:
        layer.prepare(torch.float64)
        layer(x, index)
    layer.adapters["ann"].set_strength(0.3)
    y = layer(x, index)
    for row, name in enumerate(["ann", "bob", None, "ann"]):
        layer.set_active([] if name is None else name)
        torch.testing.assert_close(y[row], layer(x[row]))


def test_new_numbers_are_seen():
    layer, x = make("in")
    layer.set_strength(0.5)
    before = layer(x)
    with torch.no_grad():
        layer.skew.mul_(0.5)
    after = layer(x)
    assert not torch.equal(before, after)
    fresh = copy.deepcopy(layer).set_strength(0.5)
    assert torch.equal(fresh(x), after)
    layer.float()
    torch.testing.assert_close(layer(x.float()).double(), after, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        layer.set_strength(0.25)
        layer(x.float())
    layer(x.float().requires_grad_()).sum().backward()


CHANGES = {
    "data": lambda skew: setattr(skew, "data", skew.data * 0.5),
    "data in place": lambda skew: skew.data.mul_(0.5),
    "numpy": lambda skew: skew.detach().numpy().__imul__(0.5),
    "set_": lambda skew: skew.set_(skew * 0.5),
}


@pytest.mark.parametrize("is_inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_without_a_version_are_seen(change, is_inference):
    with torch.inference_mode(is_inference), torch.no_grad():
        layer, x = make("in")
        layer.set_strength(0.5)
        before = layer(x)
        CHANGES[change](layer.skew)
        after = layer(x)
        assert not torch.equal(before, after)
        assert torch.equal(layer.set_strength(0.5)(x), after)


def test_files_hold_the_whole_adapter(tmp_path):
    model = randomized(adapt(nn.Sequential(nn.Linear(32, 16)), ["0"])).eval()
    x = torch.randn(4, 32)
    y = model(x)
    base = boft_ops.unload(copy.deepcopy(model))
    set_strength(model, 0.5)
    boft_ops.save_adapter(model, tmp_path / "a.safetensors")
    loaded = boft_ops.load_adapter(base, tmp_path / "a.safetensors").eval()
    assert torch.equal(loaded(x), y)
    merged = boft_ops.merge(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), model(x))


def test_a_graph_where_changes_are_not_seen(monkeypatch):
    """As in a process with an FSDP model: the graph computes the power itself."""
    monkeypatch.setattr(powers, "is_watchable", lambda parameter: False)
    layer, x = make("in", torch.float32)
    layer.set_strength(0.5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_compiled_layer():
    layer, x = make("in", torch.float32)
    layer.set_strength(0.5)
    y = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    layer.set_strength(0.25)
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_compiled_model_after_loading(tmp_path):
    """A graph takes the powers that it finds: those of what was loaded, or NaN of what changed."""
    pretrained = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
    model = adapt(copy.deepcopy(pretrained), ["0", "1"]).eval()
    other = randomized(copy.deepcopy(model))
    boft_ops.save_adapter(other, tmp_path / "a.safetensors")
    x = torch.randn(4, 32)
    set_strength(model, 0.5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), pretrained(x))
    boft_ops.load_adapter(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(compiled(x), set_strength(other, 0.5)(x))
    with torch.no_grad():
        model[1].skew.mul_(0.5)
        assert compiled(x).isnan().all()
        expected = model(x)  # an eager call computes the powers anew
        torch.testing.assert_close(compiled(x), expected)
    model.load_state_dict(set_strength(other, 1).state_dict())
    torch.testing.assert_close(compiled(x), set_strength(other, 0.5)(x))
    model.double()
    torch.testing.assert_close(compiled(x.double()), model(x.double()))


def test_training_needs_the_whole_strength():
    layer, x = make("in")
    layer.set_strength(0.5).train()
    with pytest.raises(RuntimeError, match=r"strength: expected 1 in training, or eval\(\), got"):
        layer(x)
    with torch.no_grad():
        layer(x)
    layer.set_strength(1)(x).sum().backward()
    assert layer.skew.grad is not None


def test_a_model_is_unchanged_by_an_error():
    model = randomized(adapt(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), ["0", "1"]))
    nn.init.constant_(model[1].scale_offset, -2.0)
    with pytest.raises(ValueError, match="expected 0 or 1 over a scale that is not positive"):
        set_strength(model, 0.5)
    assert model[0].strength == 1
    set_strength(model, 0)
    assert [layer.strength for layer in model] == [0, 0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: set_strength("m", 1), TypeError, "model: expected an nn.Module"),
        (lambda m: set_strength(nn.Linear(2, 2), 1), ValueError, "at least one BOFT layer, got no"),
        (lambda m: set_strength(m, 1, adapter="eve"), ValueError, "one adapter 'eve', got none"),
        (lambda m: set_strength(m, "1"), TypeError, "strength: expected a finite number, got '1'"),
        (lambda m: set_strength(m, True), TypeError, "strength: expected a finite number"),
        (lambda m: set_strength(m, math.nan), ValueError, "strength: expected a finite number"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(make("multi")[0])
