"""Further trained tensors in folders for PEFT: it computes the same with them, or refusal."""

import copy

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from boft_ops import adapt, save_adapter
from boft_ops.interop.convert import convert


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)
        self.shift = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        return self.lin(x) + self.shift


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Shifted()
        self.inner = nn.ModuleDict({"head": nn.Linear(16, 16)})
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 4)
        self.last = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.last(self.head(self.norm(self.inner["head"](self.block(x)))))


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
SHIFTED = ["block.shift", "block.lin.weight", "block.lin.bias"]
HEADS = ["head.weight", "head.bias", "inner.head.weight", "inner.head.bias"]


def trained(path, target, names):
    """A pretrained model, and a finetuned one that was saved to ``path``."""
    base = Net()
    base(torch.randn(64, 16))  # running statistics of its own
    model = adapt(copy.deepcopy(base), [target], block_size=4, n_factors=1)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    save_adapter(model, path)
    return base, model.eval()


@pytest.mark.parametrize(
    ("target", "names", "needs_base"),
    [
        ("block.lin", ["block.lin.bias"], False),
        ("block.lin", ["norm.weight", "norm.bias"], False),
        ("block.lin", HEADS, False),
        ("block.lin", HEADS[2:], False),  # "head" alone does not end like it
        ("block.lin", ["last.weight"], True),
        ("inner.head", SHIFTED, True),  # a module in another one
    ],
)
@pytest.mark.parametrize("kind", ["module", "file"])
def test_whole_modules(target, names, needs_base, kind, tmp_path):
    base, model = trained(tmp_path / "ours", target, names)
    if needs_base:
        with pytest.raises(ValueError, match=r"expected a trained '.*\.bias', too.*; or base="):
            convert(tmp_path / "ours", tmp_path / "peft", "peft")
    given = base if kind == "module" else tmp_path / "base.safetensors"
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    convert(tmp_path / "ours", tmp_path / "peft", "peft", base=given if needs_base else None)
    convert(tmp_path / "ours", tmp_path / "again", "peft", base=given)
    for folder in ("peft", "again"):
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
        torch.testing.assert_close(theirs(X), model(X), rtol=1e-4, atol=1e-5)
        assert (theirs(X) - base.eval()(X)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("target", "names", "match"),
    [
        ("block.lin", SHIFTED[:1], "block.lin: PEFT adapts no layer in modules that it saves"),
        ("inner.head", HEADS[:2], "inner.head: PEFT adapts no layer .* end like one of .'head'"),
        ("block.lin", HEADS[:1], "expected a trained 'head.bias', too, got none"),
        ("block.lin", HEADS[1:2], "expected a trained 'head.weight', too, got none"),
        ("inner.head", SHIFTED[:1], r"expected a trained 'block\..*', too, got none"),
    ],
)
@pytest.mark.parametrize("with_base", [False, True])
def test_parts_of_modules_are_refused(target, names, match, with_base, tmp_path):
    base, _ = trained(tmp_path / "ours", target, names)
    with pytest.raises(ValueError, match=match):
        convert(tmp_path / "ours", tmp_path / "peft", "peft", base=base if with_base else None)
    assert not (tmp_path / "peft").exists()


def test_another_module_whose_name_ends_alike(tmp_path):
    """Only the base model tells about them."""
    base, _ = trained(tmp_path / "ours", "block.lin", HEADS[:2])
    with pytest.raises(ValueError, match=r"expected a trained 'inner\.head\.bias', too, got none$"):
        convert(tmp_path / "ours", tmp_path / "peft", "peft", base=base)
