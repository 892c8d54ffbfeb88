"""Checkpoints that contradict themselves, or whose numbers nothing takes: an error, no output."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from boft_ops.convert import main
from boft_ops.interop.convert import convert

R = "base_model.model.0.boft_R"


@pytest.fixture
def folder(tmp_path):
    config = peft.BOFTConfig(boft_block_size=4, target_modules=["0"], modules_to_save=["1"])
    net = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))
    peft.get_peft_model(net, config).save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, **changes):
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | changes, path)


def refused(folder, capsys, match):
    """By the command, with a message in the place of a traceback, and nothing is written."""
    out = folder.with_name("out")
    assert main([str(folder), str(out), "--to", "boft_ops"]) == 1
    assert match in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("name", [R, "base_model.model.1.weight"])
def test_numbers_of_8_bits(name, dtype, folder, capsys):
    wide = load_file(folder / "adapter_model.safetensors")[name]
    change_tensors(folder, **{name: wide.to(dtype)})
    refused(folder, capsys, f"{name}: expected floating-point numbers of 16 to 64 bits")


def test_complex_constraint(tmp_path):
    tensors = {"oft_blocks": torch.zeros(2, 4, 4), "alpha": torch.zeros(1, dtype=torch.complex64)}
    file = tmp_path / "lycoris.safetensors"
    save_file({f"lycoris_0.{name}": tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(ValueError, match="alpha: expected one number"):
        convert(file, tmp_path / "out", "boft_ops", base=nn.Sequential(nn.Linear(8, 8)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("boft_dropout", 10**400),
        ("boft_dropout", -(10**400)),
        ("boft_dropout", True),
        ("boft_block_size", 4.0),
        ("boft_block_size", None),
        ("boft_n_butterfly_factor", "1"),
    ],
    ids=["large", "negative", "bool", "float", "null", "string"],
)
def test_values_of_another_kind(key, value, folder, capsys):
    change_config(folder, **{key: value})
    refused(folder, capsys, f"{key}: expected a")


@pytest.mark.parametrize(
    ("changes", "key", "got"),
    [
        ({"boft_block_size": 8}, "boft_block_size", 4),
        ({"boft_block_size": -4}, "boft_block_size", 4),
        ({"boft_block_size": 10**400}, "boft_block_size", 4),
        ({"boft_block_size": 0, "boft_block_num": 2}, "boft_block_num", 4),
        ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor", 1),
    ],
)
def test_sizes_that_the_tensors_do_not_have(changes, key, got, folder, capsys):
    change_config(folder, **changes)
    said = f"{key}: the config says {changes[key]}, the shape of boft_R {got}"
    refused(folder, capsys, said)


def test_factors_that_peft_lowered(folder, capsys):
    """One factor for several, as PEFT makes without its CUDA extension: the tensors are right."""
    change_config(folder, boft_n_butterfly_factor=2)
    with pytest.warns(UserWarning, match="n_factors is 1, as in the tensors, not 2") as said:
        adapter = convert(folder, folder.with_name("good"), "boft_ops")
    assert len(said) == 1
    assert adapter.layers["0"].config.n_factors == 1
    change_tensors(folder, **{R: torch.zeros(2, 4, 4, 4)})
    change_config(folder, boft_n_butterfly_factor=3)
    refused(folder, capsys, "boft_n_butterfly_factor: the config says 3, the shape of boft_R 2")


def test_sizes_that_the_config_leaves_to_peft(folder, capsys):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("boft_")}))
    convert(folder, folder.with_name("good"), "boft_ops")  # 4 is its default
    change_tensors(folder, **{R: torch.zeros(1, 2, 8, 8)})
    refused(folder, capsys, "boft_block_size: the config says 4")


@pytest.mark.parametrize("module", ["1", "0"])
def test_two_tensors_for_one_parameter(module, folder, capsys):
    """As ``bias="all"`` stores a trained bias, they are equal."""
    plain, inner = f"base_model.model.{module}.bias", {"1": "modules_to_save", "0": "base_layer"}
    other = f"base_model.model.{module}.{inner[module]}.bias"
    bias = torch.randn(2 if module == "1" else 8)
    change_tensors(folder, **{plain: bias, other: bias.clone()})
    adapter = convert(folder, folder.with_name("good"), "boft_ops")
    assert torch.equal(adapter.others[f"{module}.bias"], bias)
    change_tensors(folder, **{other: bias + 1})
    refused(folder, capsys, f"expected one '{module}.bias', got two that differ")


@pytest.mark.parametrize("value", ["1", [1], [""], {"1": 2}, True], ids=str)
def test_modules_to_save_that_are_no_names(value, folder, capsys):
    change_config(folder, modules_to_save=value)
    refused(folder, capsys, "modules_to_save: expected a list of names")


@pytest.mark.parametrize(
    "name", ["0.lora_A.weight", "2.oft_embedding_R.weight", "0.boft_other", "2.boft_P"]
)
def test_parameters_of_other_tuners(name, folder, capsys):
    change_tensors(folder, **{f"base_model.model.{name}": torch.zeros(2, 2)})
    refused(folder, capsys, f"expected parameters of linear layers and convolutions, got '{name}'")
