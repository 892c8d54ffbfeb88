"""Accelerated PEFT models: the scale of adapters, and adapters by rows."""

import copy
import math
import pickle

import peft
import pytest
import torch
from peft_models import boft, mlp, net, oft, tuned
from torch import nn

from boft_ops import cayley
from boft_ops.interop.peft import accelerate, patched, restore

CASES = {
    "boft": (mlp, boft(m=2)),
    "boft_conv": (net, boft(("conv", "hidden"), b=2, m=2)),
    "oft": (mlp, oft()),
    "oft_neumann": (mlp, oft(use_cayley_neumann=True)),
    "oft_conv": (net, oft(("point", "hidden"))),
}


def made(case, **others):
    make, config = CASES[case]
    torch.manual_seed(0)
    base, x = make()
    with patched():
        model = tuned(base, copy.deepcopy(config), **others).eval()
    for name, parameter in model.named_parameters():
        if "boft_R" in name or "oft_R" in name:
            nn.init.normal_(parameter, std=0.1)
    return model, base, x


def layers(model):
    return [m for m in model.modules() if hasattr(m, "strengths")]


@pytest.mark.parametrize("case", CASES)
def test_scales(case):
    model, base, x = made(case)
    before = model(x)
    for layer in layers(model):
        layer.set_scale("default", 0)
    assert torch.equal(model(x), base(x))
    for layer in layers(model):
        layer.set_scale("default", 1)
        layer.set_scale("of another layer", 3)
    assert torch.equal(model(x), before)
    for layer in layers(model):
        layer.scale_layer(0.5)
        layer.scale_layer(0.5)
    assert all(layer.strengths["default"] == 0.25 for layer in layers(model))
    quarter = model(x)
    assert not torch.allclose(quarter, before)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(x), quarter, atol=1e-5, rtol=1e-4)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="set_scale: expected an unmerged adapter, 'default'"):
        layers(model)[0].set_scale("default", 1)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), quarter, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="model: expected adapters of scale 1"):
        restore(model)
    for layer in layers(model):
        layer.unscale_layer(0.5)
        assert layer.strengths["default"] == 0.5
        layer.unscale_layer()
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-4)


def test_a_scale_is_a_power():
    model, _, x = made("oft")
    layer = model.base_model.model[0]
    layer.set_scale("default", 2)
    r = cayley(layer.at_strength("default")[0].skew)
    layer.set_scale("default", 1)
    once = cayley(layer.at_strength("default")[0].skew)
    torch.testing.assert_close(r, once @ once)
    weight = layer.at_strength("default")[0].skew
    layer.set_scale("default", 0.5)
    assert layer(x).shape == (5, 24)
    with torch.no_grad():
        layer.oft_R["default"].weight.mul_(2)  # seen without another call of set_scale
    twice = copy.deepcopy(layer)
    twice.set_scale("default", 0.5)
    assert torch.equal(layer(x), twice(x))
    layer.oft_R["default"].weight.data.mul_(0.5)  # raises no version
    assert not torch.equal(layer(x), twice(x))
    assert weight.shape == (1, 8, 6)


def test_hooks_on_a_rotation():
    """An OFT rotation with hooks gives its blocks alone, which have powers too."""
    model, base, x = made("oft")
    layer = model.base_model.model[0]
    layer.set_scale("default", 0.5)
    expected = layer(x)
    layer.oft_R["default"].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    layer.set_scale("default", 0)
    torch.testing.assert_close(layer(x), base[0](x))


def test_training_and_bad_scales():
    model, _, x = made("boft")
    layer = model.base_model.model[0]
    layer.set_scale("default", 0.5)
    model.train()
    with pytest.raises(RuntimeError, match="adapter 'default': expected scale 1 in training"):
        model(x)
    model.eval()
    layer.set_scale("default", 1)
    with pytest.raises(ValueError, match="scale: expected a finite number, got nan"):
        layer.scale_layer(math.nan)
    with pytest.raises(TypeError, match="scale: expected a finite number, got '1'"):
        layer.set_scale("default", "1")


def test_a_deleted_adapter_leaves_no_scale():
    model, _, _ = made("boft", other=boft(m=2))
    layer = model.base_model.model[0]
    layer.set_scale("other", 0.5)
    model.delete_adapter("other")
    assert layer.strengths == {}
    assert pickle.loads(pickle.dumps(layer)).strengths == {}


# --- Rows -----------------------------------------------------------------------------------------

NAMES = ["other", "__base__", "default", "other", "default"]


@pytest.mark.parametrize("is_accelerated_later", [False, True])
@pytest.mark.parametrize("case", ["boft", "oft"])
def test_adapters_by_rows(case, is_accelerated_later):
    config = boft(["2"], b=2, m=3) if case == "boft" else oft(["2"])
    model, base, x = made(case, other=config)
    if is_accelerated_later and case == "oft":
        model = accelerate(restore(model))
    rows = model(x, adapter_names=NAMES)
    torch.testing.assert_close(rows[1], base(x[1]))
    for name in ("default", "other"):
        model.set_adapter(name)
        alone = model(x)
        for i, other in enumerate(NAMES):
            if other == name:
                torch.testing.assert_close(rows[i], alone[i])
    assert torch.equal(model(x), alone)  # and the next call has the active one again
    assert isinstance(model.base_model, (peft.BOFTModel, peft.OFTModel))
    with model.disable_adapter():
        assert torch.equal(model(x, adapter_names=NAMES), base(x))


def test_rows_and_scales():
    model, base, x = made("oft", other=oft(["2"]))
    for layer in layers(model):
        layer.set_scale("default", 0)
    rows = model(x, adapter_names=NAMES)
    torch.testing.assert_close(rows[2], base(x[2]))


def test_rows_that_do_not_fit():
    model, _, x = made("boft")
    with pytest.raises(ValueError, match=r"adapter_names: expected some of .*, got 'eve'"):
        model(x, adapter_names=["eve"] * 5)
    with pytest.raises(ValueError, match="a name for each of the 5 inputs of a layer, got 2"):
        model(x, adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match=r"adapter_names: expected eval\(\)"):
        model.train()(x, adapter_names=["default"] * 5)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="adapter_names: expected unmerged adapters"):
        model(x, adapter_names=["default"] * 5)
    assert all(layer.row_names is None for layer in layers(model))


def test_rows_over_layers_that_stay_peft():
    base = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="no accelerated form"):
        model = accelerate(peft.get_peft_model(base, oft(["0", "1"]))).eval()
    with pytest.raises(ValueError, match=r"expected accelerated layers alone, got 'model.0'"):
        model(torch.zeros(2, 3, dtype=torch.long), adapter_names=["default", "__base__"])


def test_generating_with_beams_and_heads(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    targets = {"b": 4, "modules_to_save": ["lm_head"]}
    with patched():
        model = tuned(base, boft(["q_proj", "down_proj"], m=2, **targets)).eval()
        model.add_adapter("other", boft(["down_proj"], m=2, **targets))
    for name, parameter in model.named_parameters():
        if "boft_R" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [3, 4, 5]])
    names = ["other", "__base__", "default"]
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    together = model.generate(input_ids=ids, adapter_names=names, **options)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=ids[i : i + 1], **options)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=ids[i : i + 1], **options)
        assert torch.equal(together[i], alone[0])
