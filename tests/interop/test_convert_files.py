"""Converters fed with spoiled, hostile and truncated files: an error, no output, no code run."""

import json
import os
import pickle
import random
import struct
import zipfile

import peft
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from boft_ops import adapt, save_adapter
from boft_ops.convert import main
from boft_ops.interop.convert import convert, read_checkpoint


def native(folder):
    path = folder / "ours.safetensors"
    save_adapter(adapt(nn.Sequential(nn.Linear(16, 8)), ["0"], block_size=4), path)
    return path, path


def peft_folder(folder):
    config = peft.OFTConfig(oft_block_size=4, target_modules=["0"])
    peft.get_peft_model(nn.Sequential(nn.Linear(16, 8)), config).save_pretrained(folder / "peft")
    return folder / "peft", folder / "peft" / "adapter_model.safetensors"


def lycoris_file(folder):
    path = folder / "lycoris.safetensors"
    blocks = {"oft_blocks": torch.randn(2, 4, 4), "rescale": torch.ones(8, 1)}
    save_file({f"lycoris_0.{k}": v for k, v in blocks.items()} | {
        "lycoris_0.alpha": torch.tensor(0.0)}, path)  # fmt: skip
    return path, path


def onetrainer_file(folder):
    path = folder / "onetrainer.safetensors"
    tensors = {"weight": torch.randn(4, 6), "scaled_oft": torch.tensor(True)}
    save_file({f"lora_unet.0.oft_R.{k}": v for k, v in tensors.items()}, path)
    return path, path


def sd_scripts_file(folder):
    path = folder / "sd_scripts.safetensors"
    tensors = {"boft_R": torch.randn(2, 4, 4, 4), "boft_s": torch.ones(8, 1)}
    save_file({f"lora_unet_0.{k}": v for k, v in tensors.items()}, path)
    return path, path


MAKERS = {
    "boft_ops": native,
    "peft": peft_folder,
    "lycoris": lycoris_file,
    "onetrainer": onetrainer_file,
    "sd-scripts": sd_scripts_file,
}
BASE = nn.Sequential(nn.Linear(16, 8))


@pytest.fixture(params=MAKERS)
def made(request, tmp_path):
    """A checkpoint to convert, and the file of its tensors."""
    source, weights = MAKERS[request.param](tmp_path)
    convert(source, tmp_path / "good", "boft_ops", base=BASE)  # as it is, it converts
    (tmp_path / "good").unlink()
    return source, weights


def refused(source, tmp_path, match=None):
    """An error of the promised kinds, for each target, and nothing new on disk."""
    before = sorted(tmp_path.rglob("*"))
    for to in ("boft_ops", "peft", "lycoris"):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            convert(source, tmp_path / "out", to, base=BASE)
    assert sorted(tmp_path.rglob("*")) == before


def test_truncation_at_every_length(made, tmp_path):
    source, weights = made
    content = weights.read_bytes()
    for length in {*range(0, len(content), 7), *range(24), len(content) - 1}:
        weights.write_bytes(content[:length])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            read_checkpoint(source, base=BASE)
    refused(source, tmp_path)


def test_flipped_bytes_never_do_more_than_raise(made, tmp_path):
    """Whatever a byte says: a well-formed adapter or a ValueError."""
    source, weights = made
    content = weights.read_bytes()
    draw = random.Random(0)
    outcomes = set()
    for _ in range(300):
        spoiled = bytearray(content)
        for _ in range(draw.choice([1, 1, 4])):
            spoiled[draw.randrange(min(len(spoiled), 600))] = draw.randrange(256)
        weights.write_bytes(spoiled)
        try:
            adapter = read_checkpoint(source, base=BASE)
            assert all(layer.skew.isfinite().all() for layer in adapter.layers.values())
            outcomes.add("read")
        except ValueError:
            outcomes.add("refused")
    assert "refused" in outcomes


def test_huge_and_senseless_headers(made, tmp_path):
    source, weights = made
    entry = {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}
    headers = [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 100) + b"[" * 100,
        struct.pack("<Q", 4) + b"null",
    ]
    for text in (json.dumps({"a": entry}), '{"a": ' * 20000 + "1" + "}" * 20000):
        headers.append(struct.pack("<Q", len(text)) + text.encode() + b"\0" * 4)
    for content in headers:
        weights.write_bytes(content)
        refused(source, tmp_path)


SPOILED = {
    "NaN": lambda t: t.masked_fill(torch.ones_like(t, dtype=torch.bool), float("nan")),
    "infinity": lambda t: t + float("inf"),
    "integers": lambda t: t.long(),
    "no element": lambda t: t[:0],
    "one dimension": lambda t: t.flatten(),
    "a further dimension": lambda t: t[None, None],
    "another block size": lambda t: torch.zeros(*t.shape[:-1], t.shape[-1] + 1),
}


@pytest.mark.parametrize("how", SPOILED)
def test_spoiled_tensors(how, made, tmp_path):
    source, weights = made
    tensors = load_file(weights)
    key = next(k for k in tensors if "skew" in k or "oft_" in k)
    tensors[key] = SPOILED[how](tensors[key])
    metadata = metadata_of(weights)
    save_file({k: t.contiguous() for k, t in tensors.items()}, weights, metadata)
    refused(source, tmp_path)


def metadata_of(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


NAMES = ["../../etc/passwd", "/abs/olute", "..", "a..b", "a\nb", "a\0b", ""]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_never_paths(name, tmp_path):
    """A name may hold a slash, as a module's may: then it is a key of the file, and no path."""
    folder = tmp_path / "peft"
    folder.mkdir()
    peft.OFTConfig(oft_block_size=4, target_modules=["x"]).save_pretrained(folder)
    tensors = {f"base_model.model.{name}.oft_R.weight": torch.zeros(4, 6)}
    save_file(tensors, folder / "adapter_model.safetensors")
    before = sorted(tmp_path.rglob("*"))
    if name in ("/abs/olute",):
        convert(folder, tmp_path / "out", "boft_ops")
        assert set(load_file(tmp_path / "out")) == {"/abs/olute.skew"}
        (tmp_path / "out").unlink()
    else:
        with pytest.raises(ValueError, match="dotted names"):
            convert(folder, tmp_path / "out", "boft_ops")
    assert sorted(tmp_path.rglob("*")) == before


CONFIGS = [b"", b"{", b"[]", b'"OFT"', b"\xff\xfe", b"[" * 100_000, b'{"peft_type": "OFT"',
           b'{"peft_type": {"a": 1}}', b'{"peft_type": "OFT", "coft": 3}',
           b'{"peft_type": "OFT", "use_cayley_neumann": "no"}',
           b'{"peft_type": "OFT", "module_dropout": NaN, "use_cayley_neumann": false}',
           b'{"peft_type": "OFT", "num_cayley_neumann_terms": 1e999}',
           b'{"peft_type": "BOFT", "boft_dropout": "0.1"}',
           b'{"peft_type": "OFT", "x": "' + b"a" * (17 << 20) + b'"}']  # fmt: skip


@pytest.mark.parametrize("content", CONFIGS, ids=range(len(CONFIGS)))
def test_mixed_up_configurations(content, tmp_path):
    source, _ = peft_folder(tmp_path)
    (source / "adapter_config.json").write_bytes(content)
    refused(source, tmp_path)


OPTIONS = [
    {"block_size": 8}, {"block_size": "4"}, {"n_factors": 3}, {"side": "up"}, {"side": ["in"]},
    {"method": "exec"}, {"scale": False}, {"scale": "yes"}, {"p_block": 2}, {"p_block": "0"},
    {"p_component": None}, {"block_size": 10**400}, {"extra": 1},
]  # fmt: skip


@pytest.mark.parametrize("change", OPTIONS, ids=str)
def test_options_that_do_not_fit_the_tensors(change, tmp_path):
    source, _ = native(tmp_path)
    metadata = metadata_of(source)
    layers = json.loads(metadata["layers"])
    layers["0"] |= change
    save_file(load_file(source), source, metadata | {"layers": json.dumps(layers)})
    refused(source, tmp_path)


@pytest.mark.parametrize("forged", [False, True])
def test_a_kaleidoscope_is_no_butterfly(forged, tmp_path):
    """Nor is a butterfly that calls itself one."""
    source = tmp_path / "ours.safetensors"
    more = {} if forged else {"kaleidoscope": 1}
    save_adapter(adapt(nn.Sequential(nn.Linear(16, 8)), ["0"], block_size=4, **more), source)
    if forged:
        metadata = metadata_of(source)
        layers = json.loads(metadata["layers"])
        layers["0"]["kaleidoscope"] = 1
        save_file(load_file(source), source, metadata | {"layers": json.dumps(layers)})
    refused(source, tmp_path, "0: kaleidoscope: expected a butterfly")


BASES = ["[]", '{"0": 3}', '{"0": ["Linear"]}', '{"0": ["Linear", "8"]}', '{"0": ["os", 8]}',
         '{"0": ["Linear", true]}', '{"0": ["Linear", -8]}', "{",
         '{"0": ["Linear", 9]}']  # fmt: skip


@pytest.mark.parametrize("bases", BASES)
def test_kinds_of_layers_that_make_no_sense(bases, tmp_path):
    source, _ = native(tmp_path)
    save_file(load_file(source), source, metadata_of(source) | {"bases": bases})
    with pytest.raises(ValueError):  # noqa: PT011  each of them has its own message
        convert(source, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


class Evil:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickles_with_code(tmp_path):
    trace = tmp_path / "executed"
    evil = {"lycoris_0.oft_blocks": Evil(trace)}
    files = {}
    for suffix in (".pt", ".bin", ".ckpt", ".pth"):
        files[f"new{suffix}"] = lambda path: torch.save(evil, path)
        files[f"old{suffix}"] = lambda path: torch.save(
            evil, path, _use_new_zipfile_serialization=False
        )
        files[f"plain{suffix}"] = lambda path: path.write_bytes(pickle.dumps(evil))
    files["plain.safetensors"] = lambda path: path.write_bytes(pickle.dumps(evil))
    for name, write in files.items():
        path = tmp_path / name
        write(path)
        refused(path, tmp_path, "not a file of tensors alone|not a whole safetensors")
        path.unlink()
    assert not trace.exists()
    # the same inside a PEFT folder, where it would be loaded in the absence of safetensors
    source, weights = peft_folder(tmp_path)
    weights.unlink()
    torch.save(evil, source / "adapter_model.bin")
    refused(source, tmp_path, "not a file of tensors alone")
    assert not trace.exists()
    # and the trap works, or none of this would show anything
    with open(source / "adapter_model.bin", "rb") as file, zipfile.ZipFile(file) as archive:
        inner = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        pickle.loads(archive.read(inner))
    assert trace.exists()


def test_tensors_that_claim_more_than_they_have(tmp_path):
    blocks = torch.randn(1).expand(1 << 15, 1 << 15, 2, 2)
    assert blocks.untyped_storage().nbytes() == 4
    strange = [
        blocks,
        torch.zeros(2, 4, 4, device="meta"),
        torch.zeros(2, 4, 4).to_sparse(),
        [1, 2],
        {"nested": torch.zeros(2, 4, 4)},
    ]
    for value in strange:
        torch.save({"lycoris_0.oft_blocks": value}, tmp_path / "l.pt")
        refused(tmp_path / "l.pt", tmp_path, "expected names with plain tensors|tensors alone")
    torch.save([torch.zeros(2, 4, 4)], tmp_path / "l.pt")
    refused(tmp_path / "l.pt", tmp_path, "expected a dict")
    torch.save({3: torch.zeros(2, 4, 4)}, tmp_path / "l.pt")
    refused(tmp_path / "l.pt", tmp_path, "expected names")


def test_truncated_pickles(tmp_path):
    path = tmp_path / "l.pt"
    torch.save({"lycoris_0.oft_blocks": torch.randn(2, 4, 4)}, path)
    convert(path, tmp_path / "good", "boft_ops", base=BASE)
    content = path.read_bytes()
    for length in range(0, len(content), 41):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="not a file of tensors alone"):
            read_checkpoint(path, base=BASE)


@pytest.mark.parametrize("alpha", [[-1.0], [float("nan")], [float("inf")], [0.0, 0.0]])
def test_constraints_that_are_none(alpha, tmp_path):
    source, _ = lycoris_file(tmp_path)
    save_file(load_file(source) | {"lycoris_0.alpha": torch.tensor(alpha)}, source)
    refused(source, tmp_path, "alpha: expected one number")


def test_places_of_the_result(tmp_path):
    source, _ = native(tmp_path)
    for to in ("boft_ops", "peft"):
        with pytest.raises(FileExistsError, match="expected a new path"):
            convert(source, source, to)
        with pytest.raises(FileNotFoundError, match="in a folder"):
            convert(source, tmp_path / "no" / "out", to)
    (tmp_path / "dangling").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        convert(source, tmp_path / "dangling", "boft_ops")
    assert not (tmp_path / "target").exists()
    for missing in (tmp_path / "nothing", tmp_path / "nothing.bin"):
        with pytest.raises(FileNotFoundError):
            convert(missing, tmp_path / "out", "peft")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        convert(tmp_path / "empty", tmp_path / "out", "boft_ops")
    with pytest.raises(FileNotFoundError, match="base"):
        convert(source, tmp_path / "out", "peft", base=tmp_path / "empty")
    with pytest.raises(ValueError, match="to: expected one of"):
        convert(source, tmp_path / "out", "gguf")


@pytest.mark.parametrize("to", ["boft_ops", "peft"])
def test_a_full_disk_leaves_nothing(to, tmp_path, monkeypatch):
    source, _ = native(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(source, tmp_path / "out", to)
    assert sorted(tmp_path.rglob("*")) == before


def test_foreign_files(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"weight": torch.zeros(2)}))
    refused(path, tmp_path, "expected a file of save_adapter")


def test_command_line(tmp_path, capsys):
    source, _ = lycoris_file(tmp_path)
    save_file(BASE.state_dict(), tmp_path / "base.safetensors")
    out = str(tmp_path / "ours")
    arguments = [str(source), out, "--to", "boft_ops", "--base", str(tmp_path / "base.safetensors")]
    assert main(arguments) == 0
    assert "1 layers, 0 further tensors" in capsys.readouterr().out
    assert main(arguments) == 1  # it is there already
    assert "error: destination: expected a new path" in capsys.readouterr().err
    assert main([out, str(tmp_path / "peft"), "--to", "peft"]) == 1
    assert "PEFT rotates the inputs" in capsys.readouterr().err
    assert main([out, str(tmp_path / "again"), "--to", "lycoris", "--prefix", "lora"]) == 0
    assert set(load_file(tmp_path / "again")) == {
        f"lora_0.{part}" for part in ("oft_blocks", "alpha", "rescale")
    }
