"""Merging an adapter into the files of a checkpoint: the numbers of merge(), whole or nothing."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from boft_ops import adapt, load_adapter, merge, save_adapter
from boft_ops._runtime import files
from boft_ops.interop import merge_checkpoint as merging
from boft_ops.interop.convert import convert
from boft_ops.interop.formats.checkpoint import shapes_of, tensor_reader
from boft_ops.interop.merge_checkpoint import merge_checkpoint, plan_merge

OPTIONS = {"up": {}, "down": {"n_factors": 1, "scale": False}, "out": {"side": "out"}}


class Model(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32, dtype=dtype), nn.Linear(32, 16, dtype=dtype)
        self.out, self.conv = nn.Linear(16, 16), nn.Conv2d(8, 4, 2)
        self.head = nn.Linear(16, 3)
        self.register_buffer("steps", torch.arange(5))


@pytest.fixture
def case(tmp_path):
    """A checkpoint of three files, an adapter with a trained head, and the merged state."""
    torch.manual_seed(0)
    model = Model()
    state = model.state_dict()
    base = tmp_path / "base"
    base.mkdir()
    parts = [("up.", "steps"), ("down.", "out."), ("conv.", "head.")]
    weight_map = {}
    for i, starts in enumerate(parts):
        part = {name: t for name, t in state.items() if name.startswith(starts)}
        file = f"model-{i}.safetensors"
        save_file(part, base / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / merging.INDEX).write_text(json.dumps(index))
    (base / "config.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    adapt(model, OPTIONS | {"conv": {}}, modules_to_save=["head"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapter = tmp_path / "adapter.safetensors"
    save_adapter(model, adapter)
    return base, adapter, merge(model).state_dict()


def read(folder):
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_the_files_hold_what_merge_computes(case, tmp_path, monkeypatch):
    base, adapter, want = case
    monkeypatch.setattr(merging, "ROWS", 100)  # several parts of a weight
    lines = []
    merge_checkpoint(base, tmp_path / "out", adapter, report=lines.append)
    assert_equal(read(tmp_path / "out"), want)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in base.iterdir()} - {"pytorch_model.bin"}
    index = json.loads((tmp_path / "out" / merging.INDEX).read_text())
    assert index == json.loads((base / merging.INDEX).read_text())
    with files.open_safetensors(tmp_path / "out" / "model-0.safetensors") as file:
        assert file.metadata() == {"format": "pt"}
    assert lines == [
        "1/3 model-0.safetensors: 1 of 3 tensors",
        "2/3 model-1.safetensors: 2 of 4 tensors",
        "3/3 model-2.safetensors: 3 of 4 tensors",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "base", "out"]


def test_one_file_and_the_command(case, tmp_path):
    base, adapter, want = case
    whole = tmp_path / "whole.safetensors"
    save_file(read(base), whole)
    command = [sys.executable, "-m", "boft_ops", "merge", whole, tmp_path / "out.safetensors"]
    done = subprocess.run([*command, "--adapter", adapter], capture_output=True, text=True)
    assert done.stdout == "1/1 whole.safetensors: 6 of 11 tensors\n", done.stderr
    assert_equal(load_file(tmp_path / "out.safetensors"), want)
    done = subprocess.run([*command, "--adapter", adapter], capture_output=True, text=True)
    assert (done.returncode, "expected a new path" in done.stderr) == (1, True)


def test_the_converter_writes_the_same_files(case, tmp_path):
    base, adapter, want = case
    out = tmp_path / "merged"
    written = convert(adapter, out, "merged", base=base)
    assert written.layers.keys() == {"up", "down", "out", "conv"}
    assert_equal(read(out), want)
    with pytest.raises(ValueError, match="base: expected the files of the model for to='merged'"):
        convert(adapter, tmp_path / "other", "merged", base=Model())
    assert not (tmp_path / "other").exists()


def test_a_killed_merge_goes_on(case, tmp_path, monkeypatch):
    base, adapter, want = case
    written = []

    def failing(weight, layer, merged=merging.merged_tensor):
        written.append(layer)
        if len(written) == 3:
            raise RuntimeError("killed")
        return merged(weight, layer)

    monkeypatch.setattr(merging, "merged_tensor", failing)
    with pytest.raises(RuntimeError, match="killed"):
        merge_checkpoint(base, tmp_path / "out", adapter)
    assert not (tmp_path / "out").exists()
    lines = []
    merge_checkpoint(base, tmp_path / "out", adapter, report=lines.append)
    assert lines[0] == "1/3 model-0.safetensors: 1 of 3 tensors (was there)"
    assert len(written) == 3 + 3  # one layer was merged already
    assert_equal(read(tmp_path / "out"), want)


def test_another_merge_does_not_go_on_in_the_files_of_the_former(case, tmp_path, monkeypatch):
    base, adapter, want = case
    half = tmp_path / ".boft_ops-merging-out"
    half.mkdir()
    (half / "model-0.safetensors").write_bytes(b"of another adapter")
    (half / merging.STATE).write_text("{}")
    merge_checkpoint(base, tmp_path / "out", adapter)
    assert_equal(read(tmp_path / "out"), want)


def test_a_head_that_the_base_lacks_is_added(case, tmp_path):
    base, adapter, want = case
    last = base / "model-2.safetensors"
    save_file({n: t for n, t in load_file(last).items() if not n.startswith("head")}, last)
    index = json.loads((base / merging.INDEX).read_text())
    for name in ("head.weight", "head.bias"):
        del index["weight_map"][name]
    (base / merging.INDEX).write_text(json.dumps(index))
    merge_checkpoint(base, tmp_path / "out", adapter)
    assert_equal(read(tmp_path / "out"), want)
    index = json.loads((tmp_path / "out" / merging.INDEX).read_text())
    assert index["weight_map"]["head.bias"] == "model-2.safetensors"


def test_every_reader_of_a_base_takes_the_files_that_its_index_names(case, tmp_path):
    base, adapter, _ = case
    want = load_file(base / "model-0.safetensors")["up.weight"]
    stray = {"up.weight": torch.zeros(32, 8), "another.weight": torch.zeros(2, 2)}
    save_file(stray, base / "stray.safetensors")
    assert torch.equal(tensor_reader(base)("up.weight"), want)
    shapes = shapes_of(base)
    assert shapes["up"] == (32, 16)
    assert "another" not in shapes
    merge_checkpoint(base, tmp_path / "out", adapter)
    assert not (tmp_path / "out" / "stray.safetensors").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(case, tmp_path):
    base, adapter, _ = case
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="a path in a folder"):
        merge_checkpoint(base, tmp_path / "no" / "out", adapter)
    with pytest.raises(FileNotFoundError, match="base: expected a safetensors file or a folder"):
        merge_checkpoint(tmp_path / "none", out, adapter)
    spoiled = base / "model-0.safetensors"
    content = load_file(spoiled)
    for name, tensor, match in (
        ("up.weight", None, "expected a tensor 'up.weight', got none"),
        ("up.weight", torch.zeros(32, 8), "expected a rotation of 8 features"),
        ("up.weight", torch.zeros(32, 16, dtype=torch.float8_e4m3fn), "a quantized weight cannot"),
    ):
        part = content | {name: tensor}
        save_file({n: t for n, t in part.items() if t is not None}, spoiled)
        with pytest.raises(ValueError, match=match):
            plan_merge(base, adapter)
        with pytest.raises(ValueError, match=match):
            merge_checkpoint(base, out, adapter)
    (base / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected 'model-1.safetensors', which .* names"):
        merge_checkpoint(base, out, adapter)
    (base / merging.INDEX).write_text('{"weight_map": {"a": "../b"}}')
    with pytest.raises(ValueError, match="expected files of its own folder"):
        merge_checkpoint(base, out, adapter)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "base"]


def test_a_merged_checkpoint_is_read_as_a_plain_model(case, tmp_path):
    base, adapter, _ = case
    merge_checkpoint(base, tmp_path / "out", adapter)
    plain, adapted = Model(), Model()
    plain.load_state_dict(read(tmp_path / "out"))
    adapted.load_state_dict(read(base))
    load_adapter(adapted, adapter).eval()
    x = torch.randn(4, 16)
    torch.testing.assert_close(plain.out(x), adapted.out(x), rtol=1e-4, atol=1e-5)
