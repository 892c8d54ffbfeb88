"""Files of OneTrainer's OFT, against its formulas in float64."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from boft_ops import load_adapter
from boft_ops.interop.convert import convert, read_checkpoint
from boft_ops.interop.serve import adapter_rows, load_adapters


class Block(nn.Module):
    """A linear layer and two convolutions, with names in which dots and underscores mix."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 6, 3, padding=1)
        self.attn = nn.ModuleDict({"to_q": nn.Linear(6 * 5 * 5, 8), "proj": nn.Conv2d(6, 6, 1)})

    def forward(self, x):
        x = self.attn["proj"](self.conv_in(x).tanh()).tanh()
        return self.attn["to_q"](x.flatten(1))


LAYERS = {"conv_in": (9, 4), "attn.proj": (2, 3), "attn.to_q": (30, 5)}  # K and b
X = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
DIALECTS = {
    "kohya": lambda name: "lora_unet_" + name.replace(".", "_"),
    "diffusers": lambda name: f"lora_unet.{name}",
    "OMI": lambda name: f"unet.{name}",
    "transformer": lambda name: f"transformer.{name}",
    "ComfyUI": lambda name: f"diffusion_model.{name}",
}


def weights():
    return {
        name: 0.3 * torch.randn(k, b * (b - 1) // 2, generator=torch.Generator().manual_seed(k))
        for name, (k, b) in LAYERS.items()
    }


def series(vector, b, scaled=False):
    """The blocks that OneTrainer computes: I + 2Q + 2Q^2 + 2Q^3 + Q^4."""
    q = torch.zeros(len(vector), b, b, dtype=torch.float64)
    rows, columns = torch.triu_indices(b, b, 1)
    q[:, rows, columns] = vector.double() / (2 * math.sqrt(b - 1) if scaled else 1)
    q = q - q.mT
    power, total = q, torch.eye(b, dtype=torch.float64) + 2 * q
    for factor in (2, 2, 1):
        power = power @ q
        total = total + factor * power
    return total


def theirs(base, vectors, scaled=False):
    """Linear layers rotate their inputs, x R, so W R^T; convolutions their kernels, W R."""
    model = copy.deepcopy(base).double()
    for name, vector in vectors.items():
        layer, b = model.get_submodule(name), LAYERS[name][1]
        rotation = torch.block_diag(*series(vector, b, scaled).expand(LAYERS[name][0], b, b))
        with torch.no_grad():
            flat = layer.weight.flatten(1)
            rotated = flat @ (rotation.T if flat.dim() == layer.weight.dim() else rotation)
            layer.weight.copy_(rotated.view_as(layer.weight))
    return model(X.double())


def written(path, vectors, dialect="kohya", **flags):
    tensors = {}
    for name, vector in vectors.items():
        key = f"{DIALECTS[dialect](name)}.oft_R"
        tensors |= {f"{key}.weight": vector} | {f"{key}.{k}": v for k, v in flags.items()}
    save_file({k: v.clone() for k, v in tensors.items()}, path)
    return path


def close(got, want, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("source_format", ["auto", "onetrainer", "sd-scripts"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_of_names(dialect, source_format, tmp_path):
    base, vectors = Block(), weights()
    path = written(tmp_path / "ot.safetensors", vectors, dialect)
    convert(path, tmp_path / "ours", "boft_ops", base=base, source_format=source_format)
    mine = load_adapter(copy.deepcopy(base), tmp_path / "ours")
    want = theirs(base, vectors)
    close(mine(X), want)
    assert (want - base.double()(X.double())).abs().max() > 0.05
    assert mine.attn["to_q"].options()["method"] == "neumann5"


def test_the_two_directions_differ():
    """Or the direction of a convolution would not matter here at all."""
    base, vectors = Block(), weights()
    turned = {name: -v if "conv" in name else v for name, v in vectors.items()}
    assert (theirs(base, vectors) - theirs(base, turned)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32])
def test_scaled(dtype, tmp_path):
    """A file that is saved in bfloat16 has the flag in bfloat16, too."""
    base, vectors = Block(), {n: 5 * v for n, v in weights().items()}
    flag = torch.tensor(True).to(dtype)
    path = written(tmp_path / "ot.safetensors", vectors, scaled_oft=flag)
    convert(path, tmp_path / "ours", "boft_ops", base=base)
    mine = load_adapter(copy.deepcopy(base), tmp_path / "ours")
    close(mine(X), theirs(base, vectors, scaled=True))
    with pytest.raises(ValueError, match="expected the format sd-scripts, got that of onetrainer"):
        read_checkpoint(path, base=base, source_format="sd-scripts")


def test_the_linear_layers_of_a_file_are_served(tmp_path):
    base, vectors = Block(), {"attn.to_q": weights()["attn.to_q"]}
    path = written(tmp_path / "ot.safetensors", vectors)
    want = theirs(base, vectors)
    options = {"base": copy.deepcopy(base), "prefix": "lora_unet"}
    model = load_adapters(base.eval(), {"ann": path}, **options)
    with adapter_rows(model, ["ann", None, "ann"]):
        got = model(X)
    close(got[[0, 2]], want[[0, 2]])
    close(got[1], options["base"](X).double()[1])
    with pytest.raises(ValueError, match=r"expected base=, the pretrained model"):
        load_adapters(Block(), {"ann": path})


def test_files_in_bfloat16(tmp_path):
    base, vectors = Block(), {n: v.bfloat16() for n, v in weights().items()}
    path = written(tmp_path / "ot.safetensors", vectors)
    convert(path, tmp_path / "ours", "boft_ops", base=base)
    assert load_file(tmp_path / "ours")["conv_in.skew"].dtype == torch.float32
    close(load_adapter(copy.deepcopy(base), tmp_path / "ours")(X), theirs(base, vectors))


def test_one_block_for_all(tmp_path):
    base, vectors = Block(), {n: v[:1] for n, v in weights().items()}
    path = written(tmp_path / "ot.safetensors", vectors, "OMI")
    convert(path, tmp_path / "ours", "boft_ops", base=base)
    close(load_adapter(copy.deepcopy(base), tmp_path / "ours")(X), theirs(base, vectors))


def test_into_peft(tmp_path):
    """Linear layers and 1 x 1 convolutions; PEFT's OFT of larger kernels is another function."""
    peft = pytest.importorskip("peft")
    base, vectors = Block(), weights()
    path = written(tmp_path / "all.safetensors", vectors)
    with pytest.raises(ValueError, match=r"conv_in: PEFT's OFT sums .* a kernel of \(3, 3\)"):
        convert(path, tmp_path / "peft", "peft", base=base)
    convert(path, tmp_path / "ours", "boft_ops", base=base)
    with pytest.raises(ValueError, match=r"attn.proj: PEFT's OFT sums .* none: expected base="):
        convert(tmp_path / "ours", tmp_path / "peft", "peft")
    for name in ("attn.to_q", "attn.proj"):  # apart, as PEFT has one block size
        one = {name: vectors[name]}
        path = written(tmp_path / f"{name}.safetensors", one)
        convert(path, tmp_path / name, "peft", base=base)
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()
        close(model(X), theirs(base, one))
    assert not (tmp_path / "peft").exists()


REFUSED = {
    "a flag of the branch before the release": (
        {"scaled_oft": torch.tensor(1)}, "scaled_oft: expected a flag, .* got torch.int64"
    ),
    "a flag that says no": ({"scaled_oft": torch.tensor(False)}, "scaled_oft: expected true"),
    "two flags": ({"scaled_oft": torch.ones(2)}, "scaled_oft: expected true"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_flags_that_are_refused(case, tmp_path):
    flags, match = REFUSED[case]
    path = written(tmp_path / "ot.safetensors", weights(), **flags)
    with pytest.raises(ValueError, match=match):
        convert(path, tmp_path / "out", "boft_ops", base=Block())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "tensor", "match"),
    [
        ("lora_unet_attn_to_q.dora_scale", torch.ones(8, 1), "alone, got '.*dora_scale'"),
        ("lora_unet_conv_in.lora_down.weight", torch.ones(2, 4), "alone, got '.*lora_down"),
        ("lora_unet_conv_in.alpha", torch.tensor(1.0), "alone, got '.*alpha'"),
        ("bundle_emb.word.string_to_param", torch.ones(2), "alone, got 'bundle_emb"),
        ("lora_unet_conv_out.oft_R.weight", torch.ones(9, 6), "expected one layer of that name"),
        ("lora_unet_attn_to_q.oft_R.weight", torch.ones(9, 6), "a rotation of 150 features"),
        ("lora_unet_attn_to_q.oft_R.weight", torch.ones(9, 7), "a last dimension of b"),
        ("lora_unet_attn_to_q.oft_R.weight", torch.ones(60), r"expected \(K, b\(b-1\)/2\)"),
        ("lora_unet.conv_in.oft_R.weight", torch.ones(9, 6), "dots and underscores"),
        (
            "lora_te1_q.oft_R.weight",
            torch.ones(9, 6),
            r"known network, .* lora_te1_\*",
        ),
    ],
)
def test_what_is_refused(key, tensor, match, tmp_path):
    path = written(tmp_path / "ot.safetensors", weights())
    save_file(load_file(path) | {key: tensor}, path)
    before = sorted(tmp_path.iterdir())
    for to in ("boft_ops", "diff"):
        with pytest.raises(ValueError, match=match):
            convert(path, tmp_path / "out", to, base=Block())
    assert sorted(tmp_path.iterdir()) == before


def test_the_base_is_needed(tmp_path):
    path = written(tmp_path / "ot.safetensors", weights(), "OMI")
    with pytest.raises(ValueError, match="nor linear layers from convolutions: expected base="):
        convert(path, tmp_path / "out", "boft_ops")
