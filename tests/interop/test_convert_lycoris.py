"""LyCORIS' checkpoints, converted both ways, against LyCORIS' own forward pass and loader."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from boft_ops import BOFTLinear, adapt, load_adapter, save_adapter
from boft_ops.interop.convert import convert, read_checkpoint

lycoris = pytest.importorskip("lycoris")


class Net(nn.Module):
    """Names with dots and with underscores, of which LyCORIS makes the same."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 16, 2)
        self.body = nn.ModuleDict({"fc_1": nn.Linear(16 * 4, 32), "out": nn.Linear(32, 8)})

    def forward(self, x):
        return self.body["out"](self.body["fc_1"](self.conv_in(x).tanh().flatten(1)).tanh())


X = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0))


def tuned(algo, **options):
    """LyCORIS' own training set-up on a new model, its parameters moved: the file, the output."""
    base = Net()
    net = copy.deepcopy(base)
    network = lycoris.create_lycoris(
        net, 1.0, linear_dim=4, linear_alpha=1, algo=algo, preset="full", **options
    )
    network.apply_to()  # only then are its layers, and so its parameters, part of it
    for name, parameter in network.named_parameters():
        if "rescale" in name:
            nn.init.normal_(parameter, mean=1, std=0.3)
        else:
            nn.init.normal_(parameter, std=0.2)
    return base, network.state_dict(), net(X).detach()


@pytest.mark.parametrize(
    ("rescaled", "constraint", "suffix"),
    [(False, 0, ".safetensors"), (True, 0.01, ".pt"), (True, 1e3, ".safetensors")],
)
@pytest.mark.parametrize("algo", ["boft", "diag-oft"])
def test_from_lycoris_and_back(algo, rescaled, constraint, suffix, tmp_path):
    base, state, want = tuned(algo, rescaled=rescaled, constraint=constraint)
    path = tmp_path / f"lycoris{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    convert(path, tmp_path / "ours", "boft_ops", base=base)
    mine = load_adapter(copy.deepcopy(base), tmp_path / "ours")
    assert mine.conv_in.side == "out"
    torch.testing.assert_close(mine(X), want, rtol=1e-4, atol=1e-5)
    assert (want - base(X)).abs().max() > 0.01
    convert(tmp_path / "ours", tmp_path / "back.safetensors", "lycoris")
    network, _ = lycoris.create_lycoris_from_weights(
        1.0, str(tmp_path / "back.safetensors"), net := copy.deepcopy(base)
    )
    network.apply_to()
    assert len(network.loras) == 3
    torch.testing.assert_close(net(X), want, rtol=1e-4, atol=1e-5)


def test_the_constraint_is_of_all_blocks_together(tmp_path):
    """Or clipping it would not matter here at all."""
    base, state, _ = tuned("boft", constraint=0.01)
    save_file(state, tmp_path / "l.safetensors")
    adapter = read_checkpoint(tmp_path / "l.safetensors", base=base)
    for name, layer in adapter.layers.items():
        norm = (2 * layer.skew.square().sum()).sqrt()
        torch.testing.assert_close(norm.item(), 0.01 * layer.features, rtol=1e-4, atol=0), name


@pytest.mark.parametrize(
    ("n", "m", "b"), [(32, 1, 4), (32, 2, 4), (32, 3, 8), (12, 1, 3), (32, 1, 16), (20, 1, 20)]
)
def test_fewer_factors_than_lycoris_has(n, m, b, tmp_path):
    base = nn.Sequential(nn.Linear(6, n))
    mine = adapt(copy.deepcopy(base), ["0"], block_size=b, n_factors=m, side="out")
    nn.init.normal_(mine[0].skew, std=0.3)
    nn.init.normal_(mine[0].scale_offset, std=0.3)
    save_adapter(mine, tmp_path / "ours")
    path = tmp_path / "theirs.safetensors"
    convert(tmp_path / "ours", path, "lycoris")
    net = copy.deepcopy(base)
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), net)
    network.apply_to()
    x = torch.randn(5, 6)
    torch.testing.assert_close(net(x), mine(x), rtol=1e-4, atol=1e-5)
    assert (mine(x) - base(x)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        (lambda: [BOFTLinear(16, 16)], "LyCORIS rotates the outputs"),
        (lambda: [BOFTLinear(6, 24, block_size=4, side="out")], "a power of two of blocks"),
        (lambda: [BOFTLinear(6, 10, block_size=5, n_factors=1, side="out")], "diag-oft has no"),
        (lambda: [BOFTLinear(6, 16, side="out", method="neumann5")], "exact Cayley"),
    ],
)
def test_what_lycoris_cannot_express(layers, match, tmp_path):
    save_adapter(nn.Sequential(*layers()), tmp_path / "ours")
    with pytest.raises(ValueError, match=match):
        convert(tmp_path / "ours", tmp_path / "theirs", "lycoris")
    assert not (tmp_path / "theirs").exists()


def test_trained_heads_and_inputs_do_not_cross(tmp_path):
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))
    adapt(net, ["0"], side="out", modules_to_save=["1"])
    save_adapter(net, tmp_path / "ours")
    with pytest.raises(ValueError, match="no place for further trained tensors"):
        convert(tmp_path / "ours", tmp_path / "theirs", "lycoris")
    base, state, _ = tuned("boft")
    save_file(state, tmp_path / "l.safetensors")
    with pytest.raises(ValueError, match="PEFT rotates the inputs"):
        convert(tmp_path / "l.safetensors", tmp_path / "peft", "peft", base=base)


def test_names(tmp_path):
    base, state, _ = tuned("boft")
    path = tmp_path / "l.safetensors"
    save_file(state, path)
    with pytest.raises(ValueError, match="dots cannot be told from underscores"):
        convert(path, tmp_path / "ours", "boft_ops")
    twice = nn.ModuleDict({"conv_in": nn.Conv2d(3, 16, 2), "conv": nn.ModuleDict(
        {"in": nn.Conv2d(3, 16, 2)})})  # fmt: skip
    with pytest.raises(ValueError, match="expected one layer of that name in the base, got"):
        convert(path, tmp_path / "ours", "boft_ops", base=twice)
    # the base from a file, and another trainer's prefix
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    other = {key.replace("lycoris_", "lora_unet_"): t for key, t in state.items()}
    save_file(other, path)
    with pytest.raises(ValueError, match=r"expected lycoris_\*"):
        convert(path, tmp_path / "ours", "boft_ops", base=tmp_path, prefix="lycoris")
    convert(path, tmp_path / "ours", "boft_ops", base=tmp_path / "base.safetensors")
    assert set(read_checkpoint(tmp_path / "ours").layers) == {"conv_in", "body.fc_1", "body.out"}
    save_file(other | {"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"lora_unet_x\.lora_down\.weight"):
        convert(path, tmp_path / "again", "boft_ops", base=tmp_path, prefix="lora_unet")


def test_what_is_written_is_what_was_read(tmp_path):
    base, state, _ = tuned("boft", rescaled=True)
    save_file(state, tmp_path / "l.safetensors")
    convert(tmp_path / "l.safetensors", tmp_path / "ours", "boft_ops", base=base)
    convert(tmp_path / "ours", tmp_path / "again.safetensors", "lycoris")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        want = (tensor - tensor.mT) / 2 if "blocks" in key else tensor
        torch.testing.assert_close(again[key], want.to(again[key].dtype), rtol=0, atol=0)
