"""PEFT's checkpoints, converted both ways, against PEFT's own forward pass and its own files."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from boft_ops import BOFTLinear, adapt, load_adapter, save_adapter
from boft_ops.interop.convert import convert
from boft_ops.interop.formats.peft_reader import _share_of_one


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 2, padding=1)
        self.body = nn.ModuleList([nn.Linear(8 * 16, 32), nn.Linear(32, 32, bias=False)])
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        x = self.conv(x).relu().flatten(1)
        return self.head(self.norm(self.body[1](self.body[0](x).relu())))


X = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base():
    net = Net()
    net(torch.randn(64, 4, 3, 3))  # running statistics of its own
    return net


def tuned(base, config, std=0.3):
    """PEFT's model around a copy of ``base``, every trained parameter moved."""
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * std)
    return model.eval()


CONFIGS = {
    "boft": lambda **k: peft.BOFTConfig(boft_block_size=4, target_modules=["conv", "body.0"], **k),
    "boft by number": lambda **k: peft.BOFTConfig(
        boft_block_size=0, boft_block_num=2, target_modules=["conv"], **k
    ),
    "oft exact": lambda **k: peft.OFTConfig(
        oft_block_size=8, use_cayley_neumann=False, target_modules=["body.0", "body.1"], **k
    ),
    "oft": lambda **k: peft.OFTConfig(oft_block_size=8, target_modules=["body.1"], **k),
    "coft": lambda **k: peft.OFTConfig(
        oft_block_size=4, coft=True, eps=0.5, target_modules=["body.1"], **k
    ),
}


def assert_same(got, want, frozen=None):
    """Equal up to rounding, and the adapter did something (or the test would show nothing)."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if frozen is not None:
        assert (want - frozen).abs().max() > 0.01


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["head", "norm"]}, {"bias": True}])
@pytest.mark.parametrize("name", CONFIGS)
def test_from_peft_and_back(name, extra, base, tmp_path):
    if "bias" in extra:
        extra = {"bias": f"{name.split()[0].strip('c')}_only" if name != "coft" else "oft_only"}
    model = tuned(base, CONFIGS[name](**extra), std=0.05 if name == "oft" else 0.3)
    frozen, want = base.eval()(X), model(X)
    model.save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "ours", "boft_ops")
    mine = load_adapter(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_same(mine(X), want, frozen=frozen)
    # the loaded adapter is saved again, and PEFT reads from that file what PEFT wrote
    save_adapter(mine, tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "back", "peft")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back").eval()
    assert_same(back(X), want)
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("back", "peft"))
    assert ours.keys() == theirs.keys()
    for key in ours.keys() - {k for k in ours if "_R" in k}:  # the symmetric part of A is lost
        assert torch.equal(ours[key], theirs[key])


def test_bias_of_all_layers_stores_copies_that_are_passed_over(base, tmp_path):
    config = peft.OFTConfig(
        oft_block_size=8, target_modules=["body.0"], bias="all", modules_to_save=["head"]
    )
    model = tuned(base, config, std=0.05)
    model.save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "ours", "boft_ops")
    assert_same(load_adapter(copy.deepcopy(base), tmp_path / "ours").eval()(X), model(X))


@pytest.mark.parametrize(("m", "b"), [(2, 4), (3, 4), (4, 2), (2, 8)])
@pytest.mark.parametrize("layer", ["body.0", "conv"])
def test_several_factors_by_peft_own_permutations(m, b, layer, base, tmp_path):
    """PEFT multiplies them with a CUDA extension alone: here with its functions, in plain torch."""
    from peft.tuners.boft.layer import BOFTLayer

    weight = base.get_submodule(layer).weight.detach().flatten(1)
    n, d = weight.shape
    matrices, scale = torch.randn(m, d // b, b, b), 1 + 0.3 * torch.randn(n)
    rotation = torch.eye(d)
    for i in range(m):
        order = BOFTLayer.block_butterfly_perm(None, d, (d // b) // 2**i, b // 2, m - 1)
        permutation = BOFTLayer.perm2mat(None, order)
        blocks = torch.block_diag(*BOFTLayer.cayley_batch(None, matrices[i]))
        factor = permutation @ blocks @ permutation.T
        rotation = factor @ rotation
    merged = (rotation @ weight.T).T * scale[:, None]

    folder = tmp_path / "peft"
    folder.mkdir()
    config = peft.BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, target_modules=[layer])
    config.save_pretrained(folder)
    prefix = f"base_model.model.{layer}.boft_"
    shaped = scale[None] if layer == "conv" else scale[:, None]
    save_file({f"{prefix}R": matrices, f"{prefix}s": shaped}, folder / "adapter_model.safetensors")
    convert(folder, tmp_path / "ours", "boft_ops")
    mine = load_adapter(copy.deepcopy(base), tmp_path / "ours").get_submodule(layer)
    assert mine.options()["n_factors"] == m
    assert_same(mine.merged_weight().flatten(1), merged, frozen=weight)
    convert(tmp_path / "ours", tmp_path / "back", "peft")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    skew = (matrices - matrices.mT) / 2
    torch.testing.assert_close(back[f"{prefix}R"], skew, rtol=0, atol=0)
    assert torch.equal(back[f"{prefix}s"], shaped)
    written = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (written["boft_block_size"], written["boft_n_butterfly_factor"]) == (b, m)


@pytest.mark.parametrize("method", ["exact", "neumann5"])
def test_one_factor_without_a_scale_becomes_oft(method, base, tmp_path):
    options = {"block_size": 8, "n_factors": 1, "scale": False, "method": method}
    mine = adapt(copy.deepcopy(base), ["body.0", "body.1"], **options).eval()
    for layer in mine.body:
        nn.init.normal_(layer.skew, std=0.05)
    save_adapter(mine, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "peft", "peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    assert isinstance(theirs.peft_config["default"], peft.OFTConfig)
    assert_same(theirs(X), mine(X), frozen=base.eval()(X))


def test_targets_are_whole_names(tmp_path):
    """ "0" as a list of names would match the end of "a.0", too."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(8, 8))
            self.b = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 8))})

        def forward(self, x):
            return self.b["a"](self.a(x))

    base = Twice()
    mine = adapt(copy.deepcopy(base), "a.0", block_size=4)
    nn.init.normal_(mine.a[0].skew)
    save_adapter(mine, tmp_path / "ours")
    # BOFT of two factors, which PEFT cannot make here; its targets are what is of interest
    convert(tmp_path / "ours", tmp_path / "peft", "peft")
    config = peft.PeftConfig.from_pretrained(tmp_path / "peft")
    config.boft_n_butterfly_factor = 1
    model = peft.get_peft_model(base, config)
    tuned = {n for n, m in model.named_modules() if isinstance(m, peft.tuners.boft.layer.BOFTLayer)}
    assert tuned == {"base_model.model.a.0"}


def test_dropout_keeps_its_distribution(base, tmp_path):
    config = peft.BOFTConfig(boft_block_size=4, boft_dropout=0.25, target_modules=["body.1"])
    tuned(base, config).save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "ours", "boft_ops")
    layer = load_adapter(copy.deepcopy(base), tmp_path / "ours").body[1].train()
    mask = layer.dropout.draw(layer.skew)
    assert mask.sum() == 2  # int(0.25 * 8) blocks of the one factor
    convert(tmp_path / "ours", tmp_path / "back", "peft")
    assert json.loads((tmp_path / "back/adapter_config.json").read_text())["boft_dropout"] == 0.25


@pytest.mark.parametrize("m", range(1, 12))
def test_one_factor_of_any_number_is_dropped(m):
    assert int(_share_of_one(m) * m) == 1


def test_shared_blocks_need_the_base(base, tmp_path):
    config = peft.OFTConfig(oft_block_size=8, block_share=True, target_modules=["body.1"])
    model = tuned(base, config, std=0.05)
    model.save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match="expected base="):
        convert(tmp_path / "peft", tmp_path / "ours", "boft_ops")
    assert not (tmp_path / "ours").exists()
    convert(tmp_path / "peft", tmp_path / "ours", "boft_ops", base=base)
    mine = load_adapter(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_same(mine(X), model(X), frozen=base.eval()(X))


def edited(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_cayley_neumann_terms": 7}, "num_cayley_neumann_terms: expected 5"),
        ({"peft_version": "0.17.1"}, "peft_version: expected 0.18 or later"),
        ({"peft_version": None}, "peft_version"),
        ({"peft_type": "LORA"}, "peft_type BOFT or OFT, got 'LORA'"),
        ({"peft_type": ["OFT"]}, "peft_type BOFT or OFT"),
        ({"fan_in_fan_out": True}, "Conv1D"),
        ({"coft": "yes"}, "coft: expected a bool"),
        ({"eps": "small", "coft": True}, "eps: expected a float"),
        ({"module_dropout": 7}, "p_block"),
        ({"peft_type": "BOFT"}, "oft_R"),
    ],
)
def test_peft_configurations_that_are_refused(changes, match, base, tmp_path):
    config = peft.OFTConfig(oft_block_size=8, target_modules=["body.1"])
    tuned(base, config).save_pretrained(tmp_path / "peft")
    edited(tmp_path / "peft", **changes)
    with pytest.raises(ValueError, match=match):
        convert(tmp_path / "peft", tmp_path / "ours", "boft_ops")
    assert not (tmp_path / "ours").exists()


def test_peft_oft_of_a_convolution(base, tmp_path):
    """Exact for a kernel of one pixel; for a larger one PEFT computes no rotation of the weight."""
    net = nn.Sequential(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 2))
    x = torch.randn(2, 8, 5, 5)
    for target in ("0", "1"):
        config = peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=[target])
        model = tuned(net, config)
        model.save_pretrained(tmp_path / target)
        if target == "1":
            with pytest.raises(ValueError, match="sums rotated patches"):
                convert(tmp_path / "1", tmp_path / "ours1", "boft_ops", base=net)
            continue
        convert(tmp_path / "0", tmp_path / "ours0", "boft_ops", base=net)
        assert_same(load_adapter(copy.deepcopy(net), tmp_path / "ours0")(x), model(x), net(x))


def saved(layers, path):
    model = nn.Sequential(*layers)
    save_adapter(model, path)
    return path


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        (lambda: [BOFTLinear(16, 16, side="out")], "PEFT rotates the inputs"),
        (lambda: [BOFTLinear(16, 8), BOFTLinear(8, 8, n_factors=1)], "one n_factors for all"),
        (lambda: [BOFTLinear(16, 8), BOFTLinear(8, 8, block_size=4)], "one block_size for all"),
        (lambda: [BOFTLinear(16, 8, p_component=0.5, p_block=0.5), BOFTLinear(16, 8)],
         "one dropout for all"),
        (lambda: [BOFTLinear(16, 8, p_component=1.0, p_block=0.5)], "one factor at a time"),
        (lambda: [BOFTLinear(16, 8, method="neumann5")], "exact Cayley transform alone"),
        (lambda: [BOFTLinear(16, 8), BOFTLinear(16, 8, method="neumann5")], "one method for all"),
    ],
)  # fmt: skip
def test_what_peft_cannot_express(layers, match, tmp_path):
    path = saved(layers(), tmp_path / "ours")
    with pytest.raises(ValueError, match=match):
        convert(path, tmp_path / "peft", "peft")
    assert not (tmp_path / "peft").exists()


def test_files_of_before_tell_no_kind_of_layer(tmp_path):
    from safetensors import safe_open

    path = saved([BOFTLinear(16, 8)], tmp_path / "ours")
    with safe_open(path, framework="pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != "bases"}
    save_file(load_file(path), path, metadata)
    with pytest.raises(ValueError, match="expected base="):
        convert(path, tmp_path / "peft", "peft")
    convert(path, tmp_path / "peft", "peft", base=nn.Sequential(nn.Linear(16, 8)))
    assert load_adapter(nn.Sequential(nn.Linear(16, 8)), path)
    with pytest.raises(ValueError, match="expected a rotation of 32 features"):
        convert(path, tmp_path / "again", "peft", base=nn.Sequential(nn.Linear(32, 8)))


def test_a_pickle_of_tensors_alone(base, tmp_path):
    model = tuned(base, CONFIGS["boft"]())
    model.save_pretrained(tmp_path / "peft", safe_serialization=False)
    assert (tmp_path / "peft" / "adapter_model.bin").is_file()
    convert(tmp_path / "peft", tmp_path / "ours", "boft_ops")
    assert_same(load_adapter(copy.deepcopy(base), tmp_path / "ours").eval()(X), model(X))
