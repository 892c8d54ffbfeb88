"""Updates of weights: `diff`, which is exact, and `lora`, which says by how much it is not."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from boft_ops import adapt, save_adapter
from boft_ops.convert import main
from boft_ops.interop.convert import convert

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 2)
        self.body = nn.ModuleDict({"fc_1": nn.Linear(64, 32), "out": nn.Linear(32, 8)})
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body["out"](self.body["fc_1"](self.conv(x).tanh().flatten(1)).tanh()))


X = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
LAYERS = ["conv", "body.fc_1", "body.out"]


def adapted(path, base, std=0.3, **options):
    """An adapted copy of the model with random numbers, and its file."""
    model = adapt(copy.deepcopy(base), LAYERS, block_size=4, **options)
    if "modules_to_save" in options:
        model.body["fc_1"].bias.requires_grad_()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    save_adapter(model, path)
    return model.eval()


def added(base, tensors, prefix):
    """The model after the tools' formula: weight += diff, bias += diff_b."""
    model = copy.deepcopy(base)
    used = set()
    with torch.no_grad():
        for name, module in model.named_modules():
            key = f"{prefix}_{name.replace('.', '_')}"
            for parameter, suffix in (("weight", "diff"), ("bias", "diff_b")):
                if (update := tensors.get(f"{key}.{suffix}")) is not None:
                    getattr(module, parameter).add_(update)
                    used.add(f"{key}.{suffix}")
    assert used == tensors.keys()
    return model


@pytest.mark.parametrize("base_is", ["module", "file"])
@pytest.mark.parametrize("prefix", [None, "lora_te1"])
def test_diff(prefix, base_is, tmp_path):
    base = Net()
    model = adapted(tmp_path / "ours", base, modules_to_save=["head"])
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    given = base if base_is == "module" else tmp_path / "base.safetensors"
    out = tmp_path / "diff.safetensors"
    convert(tmp_path / "ours", out, "diff", base=given, prefix=prefix)
    tensors = load_file(out)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    got = added(base, tensors, prefix or "lora_unet")
    torch.testing.assert_close(got(X), model(X), rtol=1e-4, atol=1e-5)
    assert (model(X) - base(X)).abs().max() > 0.05


@pytest.mark.parametrize("side", ["in", "out"])
def test_diff_by_lycoris_own_loader_and_forward(side, tmp_path):
    lycoris = pytest.importorskip("lycoris")
    base = Net()
    model = adapted(tmp_path / "ours", base, n_factors=1, side=side)
    out = tmp_path / "diff.safetensors"
    convert(tmp_path / "ours", out, "diff", base=base, prefix="lycoris")
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(out), net := copy.deepcopy(base))
    network.apply_to()
    assert len(network.loras) == 3
    torch.testing.assert_close(net(X), model(X), rtol=1e-4, atol=1e-5)


def test_names_of_a_trainers_file_are_kept(tmp_path):
    """Tools know the names under which the trainer wrote the file, not those of the base."""
    base = nn.ModuleDict({"mid_block": nn.ModuleDict({"to_q": nn.Linear(12, 8)})})
    for alias in ("lora_unet_mid_block_to_q", "unet.mid_block.to_q"):
        path = tmp_path / f"{alias}.safetensors"
        save_file({f"{alias}.oft_R.weight": 0.1 * torch.randn(3, 6)}, path)
        convert(path, tmp_path / f"{alias}.diff", "diff", base=base)
        assert load_file(tmp_path / f"{alias}.diff").keys() == {f"{alias}.diff"}


def test_a_base_in_bfloat16(tmp_path):
    base = Net().bfloat16()
    model = adapted(tmp_path / "ours", base)
    convert(tmp_path / "ours", tmp_path / "diff", "diff", base=base)
    got = added(Net().float().train(), load_file(tmp_path / "diff"), "lora_unet")
    assert got.conv.weight.dtype == torch.float32
    update = load_file(tmp_path / "diff")["lora_unet_body_out.diff"]
    wide = base.body["out"].weight.float() + update
    torch.testing.assert_close(wide.bfloat16(), model.body["out"].merged_weight(), rtol=0, atol=0)


@pytest.mark.parametrize("rank", [64, 70])
def test_lora_of_full_rank_is_exact(rank, tmp_path):
    base = Net()
    model = adapted(tmp_path / "ours", base, modules_to_save=["head"])
    done = convert(
        tmp_path / "ours", tmp_path / "lora", "lora", base=base, rank=rank, max_error=1e-6
    )
    assert done.errors.keys() == set(LAYERS)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    assert theirs.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(theirs(X), model(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.merge_and_unload()(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4])
def test_lora_is_the_best_of_its_rank_and_says_its_error(rank, tmp_path, capsys):
    base = Net()
    model = adapted(tmp_path / "ours", base)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    arguments = [str(tmp_path / "ours"), str(tmp_path / "lora"), "--to=lora", f"--rank={rank}"]
    arguments += [f"--base={tmp_path / 'base.safetensors'}"]
    assert main([*arguments, "--max-error=1"]) == 0
    printed = capsys.readouterr().out
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name in LAYERS:
        update = model.get_submodule(name).merged_weight() - base.get_submodule(name).weight
        update = update.detach().double().flatten(1)
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        left = (update - b.flatten(1) @ a.flatten(1)).norm() / update.norm()
        values = torch.linalg.svdvals(update)
        best = (values[rank:].square().sum() / values.square().sum()).sqrt()
        torch.testing.assert_close(left, best, rtol=1e-4, atol=1e-5)
        assert f"{name}: relative error {left:.4f}\n" in printed
        assert left > 0.1


def test_lora_beyond_the_allowed_error_writes_nothing(tmp_path, capsys):
    base = Net()
    adapted(tmp_path / "ours", base)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    arguments = [str(tmp_path / "ours"), str(tmp_path / "lora"), "--to=lora", "--rank=2"]
    arguments += [f"--base={tmp_path / 'base.safetensors'}", "--max-error=0.2"]
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "expected a relative error of at most 0.2 at rank 2, got 0." in error
    assert "in 3 of 3 layers" in error
    assert sorted(tmp_path.rglob("*")) == before


LORA = {"to": "lora", "base": Net(), "rank": 2, "max_error": 1.0}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"rank": None}, ValueError, "rank: expected an integer >= 1, got None"),
        ({"rank": 0}, ValueError, "rank: expected an integer >= 1, got 0"),
        ({"rank": 2.0}, TypeError, r"rank: expected an integer >= 1, got 2\.0"),
        ({"max_error": None}, ValueError, "max_error: expected the largest relative error"),
        ({"max_error": float("nan")}, ValueError, "max_error: expected .* from 0 to 1, got nan"),
        ({"max_error": "1"}, TypeError, "max_error: expected"),
        ({"base": None}, ValueError, "base: expected the pretrained model, whose weights 'lora'"),
        ({"to": "diff"}, ValueError, "rank: expected none, as 'diff' is exact, got 2"),
        ({"to": "peft", "rank": None}, ValueError, "max_error: expected none, as 'peft'"),
    ],
)
def test_options_of_approximations(change, error, match, tmp_path):
    adapted(tmp_path / "ours", LORA["base"])
    with pytest.raises(error, match=match):
        convert(tmp_path / "ours", tmp_path / "out", **(LORA | change))
    assert not (tmp_path / "out").exists()


def test_bases_that_do_not_fit(tmp_path):
    base = Net()
    adapted(tmp_path / "ours", base, modules_to_save=["head"])
    meta = nn.Conv2d(4, 16, 2, device="meta")
    cases = {
        "head.bias: expected the shape .* of the base": ("head", nn.Linear(8, 3)),
        "base: expected a tensor 'head.bias', got none": ("head", nn.Identity()),
        "base: expected a tensor 'conv.weight', got none": ("conv", nn.Identity()),
        "conv: expected a rotation of 36 features": ("conv", nn.Conv2d(4, 16, 3)),
        "base: conv.weight: expected a plain tensor .* on meta": ("conv", meta),
    }
    for match, (name, module) in cases.items():
        other = Net()
        setattr(other, name, module)
        with pytest.raises(ValueError, match=match):
            convert(tmp_path / "ours", tmp_path / "out", "diff", base=other)
    assert not (tmp_path / "out").exists()


def test_statistics_have_no_diff(tmp_path):
    base = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    save_adapter(
        adapt(copy.deepcopy(base), ["0"], block_size=4, modules_to_save=["1"]), tmp_path / "ours"
    )
    with pytest.raises(ValueError, match="expected a weight or a bias, which alone have a diff"):
        convert(tmp_path / "ours", tmp_path / "out", "diff", base=base)
