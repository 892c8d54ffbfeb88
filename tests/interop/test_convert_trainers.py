"""LyCORIS files as trainers write them: several networks in one, with names of another form."""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from boft_ops.convert import main
from boft_ops.interop.convert import convert
from boft_ops.interop.formats import trainers
from boft_ops.interop.formats.mangled import mangle, names_of


def blocks(names, prefix, n=4, b=8):
    """The tensors of diag-oft for layers of these names."""
    tensors = {}
    for name in names:
        mangled = mangle(name, prefix)
        tensors[f"{mangled}.oft_blocks"] = 0.1 * torch.randn(n, b, b)
        tensors[f"{mangled}.alpha"] = torch.tensor(0.0)
    return tensors


UNET = nn.ModuleDict({"to_q": nn.Linear(32, 32), "to_k": nn.Linear(32, 32)})
ENCODER = nn.ModuleDict({"q_proj": nn.Linear(32, 32)})
NETWORKS = {"lora_unet": UNET, "lora_te": ENCODER, "lora_te1": ENCODER, "lora_te2": ENCODER}


@pytest.fixture
def file(tmp_path):
    tensors = {}
    for prefix, model in NETWORKS.items():
        tensors |= blocks(model, prefix)
    # another method for one of the encoders, as presets may choose
    tensors["lora_te2_k_proj.lora_down.weight"] = torch.zeros(4, 32)
    path = tmp_path / "all.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("prefix", NETWORKS)
def test_the_layers_of_one_network(prefix, file, tmp_path):
    if prefix == "lora_te2":
        with pytest.raises(ValueError, match=r"got 'lora_te2_k_proj\.lora_down\.weight'"):
            convert(file, tmp_path / "out", "boft_ops", base=ENCODER, prefix=prefix)
        return
    with pytest.warns(UserWarning, match="left out") as said:
        adapter = convert(file, tmp_path / "out", "boft_ops", base=NETWORKS[prefix], prefix=prefix)
    assert set(adapter.layers) == set(NETWORKS[prefix])
    assert len(said) == 1
    for other in NETWORKS.keys() - {prefix}:
        count = {"lora_unet": 2, "lora_te2": 2}.get(other, 1)
        assert f"{other}_* ({count} layers)" in str(said[0].message)


def test_one_of_several_networks_is_chosen_by_its_prefix(file, tmp_path, capsys):
    assert main([str(file), str(tmp_path / "out"), "--to", "boft_ops"]) == 1
    error = capsys.readouterr().err
    assert "expected layers of one known network, or prefix=" in error
    assert "got lora_te_* (1 layers), lora_te1_* (1 layers)" in error
    assert main([str(file), str(tmp_path / "out"), "--to", "boft_ops", "--prefix", "lora_te3"]) == 1
    assert "expected lora_te3_* of the prefix 'lora_te3', got lora_te_*" in capsys.readouterr().err


def test_the_only_network_needs_no_prefix(tmp_path):
    save_file(blocks(UNET, "lora_unet"), tmp_path / "f.safetensors")
    adapter = convert(tmp_path / "f.safetensors", tmp_path / "out", "boft_ops", base=UNET)
    assert adapter.aliases == {"to_q": "lora_unet_to_q", "to_k": "lora_unet_to_k"}
    convert(tmp_path / "f.safetensors", tmp_path / "same.safetensors", "lycoris", base=UNET)
    assert load_file(tmp_path / "same.safetensors").keys() == blocks(UNET, "lora_unet").keys()


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_to_q.dora_scale",
        "bundle_emb.word.string_to_param",
        "lora_x.oft_blocks",
    ],
)
def test_what_belongs_to_no_other_network_is_refused(name, tmp_path):
    save_file(blocks(UNET, "lora_unet") | {name: torch.zeros(2)}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=f"alone, got '{name}'"):
        convert(tmp_path / "f.safetensors", tmp_path / "out", "peft", base=UNET, prefix="lora_unet")


def test_a_network_without_a_known_prefix(tmp_path):
    save_file(blocks(UNET, "my_net"), tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=r"one known network, or prefix=.* got 'my_net_to_k'"):
        convert(tmp_path / "f.safetensors", tmp_path / "out", "boft_ops", base=UNET)
    convert(tmp_path / "f.safetensors", tmp_path / "out", "boft_ops", base=UNET, prefix="my_net")


def test_blocks_of_comfyui_have_another_formula(tmp_path):
    path = tmp_path / "f.safetensors"
    save_file({"diffusion_model.to_q.oft_blocks": torch.zeros(4, 8, 8)}, path)
    with pytest.raises(ValueError, match=r"alone, got 'diffusion_model\.to_q.oft_blocks'"):
        convert(path, tmp_path / "out", "boft_ops", base=UNET)


# Layers of Stable Diffusion XL's UNet, by diffusers' names and by the original ones.
SDXL = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.resnets.1.time_emb_proj": "input_blocks.2.0.emb_layers.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    ),
    "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
    "mid_block.resnets.0.conv2": "middle_block.0.out_layers.3",
    "mid_block.attentions.0.proj_out": "middle_block.1.proj_out",
    "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
    "up_blocks.0.attentions.2.transformer_blocks.9.ff.net.0.proj": (
        "output_blocks.2.1.transformer_blocks.9.ff.net.0.proj"
    ),
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.attentions.0.proj_in": "output_blocks.3.1.proj_in",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.resnets.2.conv2": "output_blocks.8.0.out_layers.3",
    "conv_out": "out.2",
}


@pytest.mark.parametrize("form", ["diffusers", "original", "single file"])
def test_names_of_stable_diffusion_xl(form):
    """Trainers write the original names; the base may have any of these."""
    base = {
        "diffusers": {name: name for name in SDXL},
        "original": {name: original for name, original in SDXL.items()},
        "single file": {n: f"model.diffusion_model.{original}" for n, original in SDXL.items()},
    }[form]
    shapes = {name: (8, 8) for name in base.values()}
    shapes |= {"first_stage_model.decoder.conv_in": (8, 8)} if form == "single file" else {}
    mangled = {mangle(original, "lora_unet"): base[name] for name, original in SDXL.items()}
    assert names_of(list(mangled), shapes, "lora_unet") == mangled


def test_names_of_diffusers_for_a_unet_of_diffusers():
    mangled = {mangle(name, "lora_unet"): name for name in SDXL}
    assert names_of(list(mangled), dict.fromkeys(SDXL, (8, 8)), "lora_unet") == mangled


@pytest.mark.parametrize("form", ["unet.{}", "lora_unet.{}", "lora_unet_{}"])
def test_names_of_onetrainer_for_a_unet_of_diffusers(form):
    """OneTrainer's OMI format has dots and the original names, its other formats diffusers'."""
    called = {name: name if "lora" in form else original for name, original in SDXL.items()}
    if form.endswith("_{}"):
        called = {name: other.replace(".", "_") for name, other in called.items()}
    aliases = {name: form.format(other) for name, other in called.items()}
    tensors = {f"{alias}.oft_R.weight": torch.zeros(4, 1) for alias in aliases.values()}
    shapes = dict.fromkeys(SDXL, (6, 8))
    assert trainers.read("f", tensors, shapes, None, "onetrainer").aliases == aliases


def test_the_text_model_that_older_versions_put_around_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1
    )
    for make in (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection):
        base = make(config)
        (name,) = (n for n, _ in base.named_modules() if n.endswith("0.self_attn.q_proj"))
        save_file(
            blocks(["text_model.encoder.layers.0.self_attn.q_proj"], "lora_te1"), tmp_path / "f"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapter = convert(
                tmp_path / "f", tmp_path / make.__name__, "boft_ops", base=base, prefix="lora_te1"
            )
        assert set(adapter.layers) == {name}


def test_two_networks_that_a_file_could_be_of():
    shapes = {"first.to_q": (8, 8), "second.to_q": (8, 8)}
    with pytest.raises(ValueError, match=r"got \['first.to_q', 'second.to_q'\]"):
        names_of(["lora_unet_to_q"], shapes, "lora_unet")
    # a layer that only one has tells
    names = ["lora_unet_to_q", "lora_unet_to_k"]
    found = names_of(names, shapes | {"second.to_k": (8, 8)}, "lora_unet")
    assert found == {"lora_unet_to_q": "second.to_q", "lora_unet_to_k": "second.to_k"}
    with pytest.raises(ValueError, match="lora_unet_to_q: expected one layer of that name"):
        names_of([*names, "lora_unet_to_v"], shapes, "lora_unet")
