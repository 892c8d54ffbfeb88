"""Files changed at random: a reader returns a sound adapter, or raises an error of its own."""

import copy
import json
import shutil
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import nn

from boft_ops import adapt, load_adapter, save_adapter
from boft_ops.interop.convert import convert, read_checkpoint

BASE = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
FUZZ = settings(max_examples=60, deadline=None)

numbers = st.one_of(
    st.integers(-3, 20), st.sampled_from([10**400, -(2**63), 1.5, -0.0, 1e308]), st.booleans()
)
values = st.recursive(
    st.one_of(st.none(), numbers, st.text(max_size=5), st.sampled_from(["exact", "in", "0", "2"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)
dtypes = st.sampled_from(
    [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]
)
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def changed_tensors(draw, tensors):
    """The tensors of a file with one of them changed, removed, renamed, or another one beside."""
    tensors = dict(tensors)
    name = draw(st.sampled_from(sorted(tensors)))
    kind = draw(st.sampled_from(["dtype", "shape", "number", "remove", "rename", "add"]))
    if kind == "dtype":
        tensors[name] = tensors[name].to(draw(dtypes))
    elif kind == "shape":
        tensors[name] = torch.zeros(draw(shapes))
    elif kind == "number":
        tensors[name] = torch.full_like(
            tensors[name], draw(st.sampled_from([torch.nan, torch.inf]))
        )
    elif kind == "remove":
        del tensors[name]
    else:
        tensor = tensors.pop(name) if kind == "rename" else torch.zeros(draw(shapes))
        head, _, tail = name.rpartition(".")
        other = st.sampled_from([f"{head}.{draw(st.text(max_size=4))}", f"{name}.{tail}", tail, ""])
        tensors[draw(other)] = tensor
    return tensors


def peft_folder(config, folder):
    model = peft.get_peft_model(copy.deepcopy(BASE), config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with one checkpoint of each format."""
    folder = tmp_path_factory.mktemp("checkpoints")
    targets = {"target_modules": ["0"], "modules_to_save": ["2"], "init_weights": False}
    peft_folder(peft.BOFTConfig(boft_block_size=4, **targets), folder / "boft")
    peft_folder(peft.OFTConfig(oft_block_size=4, **targets), folder / "oft")
    model = adapt(copy.deepcopy(BASE), ["0", "2"], block_size=4, n_factors=1)
    save_adapter(model, folder / "ours.safetensors")
    blocks = {"oft_blocks": torch.randn(2, 4, 4), "rescale": torch.ones(8, 1)}
    save_file({f"lycoris_0.{k}": t for k, t in blocks.items()}, folder / "lycoris.safetensors")
    oft = {"weight": torch.randn(4, 6), "scaled_oft": torch.tensor(True)}
    save_file({f"unet.0.oft_R.{k}": t for k, t in oft.items()}, folder / "onetrainer.safetensors")
    boft = {"boft_R": torch.randn(2, 4, 4, 4), "boft_s": torch.ones(8, 1)}
    save_file({f"lora_unet_0.{k}": t for k, t in boft.items()}, folder / "sd_scripts.safetensors")
    return folder


def content(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def read(source, folder):
    """Read a checkpoint; one that is accepted is sound: it can be written, loaded and applied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lowered factors
        try:
            adapter = read_checkpoint(source, base=BASE)
        except (ValueError, FileNotFoundError):
            return
        for layer in adapter.layers.values():
            assert layer.skew.isfinite().all()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        convert(source, folder / "again", "boft_ops", base=BASE)
    try:
        model = load_adapter(copy.deepcopy(BASE), folder / "again")
    except ValueError:  # tensors of layers that this model does not have
        return
    assert model(torch.randn(2, 16)).shape == (2, 4)


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("name", ["boft", "oft"])
def test_folders_of_peft(name, files, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    config = json.loads((files / name / "adapter_config.json").read_text())
    tensors, _ = content(files / name / "adapter_model.safetensors")
    if data.draw(st.booleans()):
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(values)
    else:
        tensors = data.draw(changed_tensors(tensors))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    read(folder, folder / "out")


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("name", ["ours", "lycoris", "onetrainer", "sd_scripts"])
def test_files(name, files, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    tensors, metadata = content(files / f"{name}.safetensors")
    if metadata and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(metadata)))
        try:
            inner = json.loads(metadata[key])
        except ValueError:
            inner = None
        if isinstance(inner, dict) and inner and data.draw(st.booleans()):
            inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(values)
            metadata[key] = json.dumps(inner)
        else:
            metadata[key] = json.dumps(data.draw(values))
    else:
        tensors = data.draw(changed_tensors(tensors))
    save_file(tensors, folder / "file.safetensors", metadata)
    read(folder / "file.safetensors", folder / "out")


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_bytes(suffix, files, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    tensors, metadata = content(files / "ours.safetensors")
    path = folder / f"file{suffix}"
    if suffix == ".bin":
        torch.save(tensors, path)
        whole = bytearray(path.read_bytes())
    else:
        whole = bytearray(save(tensors, metadata))
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        del whole[at:]
    else:
        whole[at : at + 8] = data.draw(st.binary(max_size=8))
    path.write_bytes(whole)
    read(path, folder / "out")
