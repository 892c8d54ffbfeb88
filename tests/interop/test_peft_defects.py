"""Defects of PEFT itself (docs/interop.md), and what an accelerated model does instead.

A test that fails in its first half says that PEFT has mended it: then the page is to be changed.
"""

import copy

import pytest
import torch
from peft_models import boft, mlp, net, oft, tuned
from torch import nn

from boft_ops.interop.peft import accelerate, patched


def error(model, want, x):
    return (model(x) - want).abs().max().item()


def test_oft_of_a_large_kernel():
    base, x = net()
    stock = tuned(base, oft(["conv"], init_weights=True))
    assert error(stock, base(x), x) > 1e-2  # not the pretrained layer at the start
    with pytest.warns(UserWarning, match=r"base_model\.model\.conv: accelerated, but"):
        ours = accelerate(copy.deepcopy(stock))
    assert error(ours, base(x), x) < 1e-6
    for model in (stock, ours):
        torch.manual_seed(0)
        nn.init.normal_(model.base_model.model.conv.oft_R["default"].weight, std=0.1)
    y = ours(x)
    assert error(stock, y, x) > 1e-2
    stock.merge_adapter()
    assert error(stock, y, x) < 1e-5  # nor what merging gives


class Padded(nn.Conv2d):
    """Pads as EfficientNet-Lite does, in a forward of its own."""

    def forward(self, x):
        x = nn.functional.pad(x, (0, 1, 0, 1))
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride)


CONVOLUTIONS = {
    "dilated": nn.Conv2d(4, 8, 3, dilation=2),
    "circular": nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"),
    "strides": nn.Conv2d(4, 8, 2, stride=(2, 1), padding=(0, 1)),
    "same": nn.Conv2d(4, 8, 3, padding="same"),
    "subclass": Padded(4, 8, 2, stride=2),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_boft_of_all_kinds_of_convolutions(kind):
    base = nn.Sequential(copy.deepcopy(CONVOLUTIONS[kind]))
    x = torch.randn(2, 4, 9, 9)
    stock = tuned(base, boft(["0"], b=2, init_weights=True))
    try:
        same = stock(x).shape == base(x).shape and error(stock, base(x), x) < 1e-2
    except (TypeError, RuntimeError):  # padding[0] of "same"
        same = False
    assert not same
    with patched():
        model = tuned(base, boft(["0"], b=2, m=2, init_weights=True))
    assert error(model, base(x), x) < 1e-6
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=float("boft_s" in name), std=0.1)
    y = model(x)
    assert error(model, base(x), x) > 1e-2
    y.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    assert error(model, y, x) < 1e-5


def test_merging_several_oft_adapters():
    base, x = mlp()
    stock = tuned(base, oft(), other=oft())
    ours = accelerate(copy.deepcopy(stock))
    for model in (stock, ours):
        model.base_model.set_adapter(["default", "other"])
    y = stock(x)
    assert error(ours, y, x) < 1e-5
    for model in (stock, ours):
        model.merge_adapter()
    assert error(stock, y, x) > 1e-3
    assert error(ours, y, x) < 1e-5


def test_adapters_of_different_block_sizes(peft_extension):
    base, x = mlp()
    alone = tuned(base, boft(b=4, m=2))
    y = alone(x)
    alone.add_adapter("other", boft(b=2, m=2))
    assert error(alone, y, x) > 1e-3  # an adapter that is not even active
    assert error(accelerate(alone), y, x) < 1e-5


def test_safe_merging_of_convolutions():
    stock = tuned(nn.Sequential(nn.Conv2d(4, 8, 1)), boft(["0"]))
    stock.base_model.model[0].boft_s["default"].data[0, 3] = torch.inf
    ours = accelerate(copy.deepcopy(stock))
    stock.merge_adapter(safe_merge=True)
    assert not stock.base_model.model[0].base_layer.weight.isfinite().all()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights: adapter 'default'"):
        ours.merge_adapter(safe_merge=True)
    assert ours.base_model.model[0].base_layer.weight.isfinite().all()


@pytest.mark.parametrize("tuner", [boft, oft])
def test_safe_merging_of_several_adapters(tuner):
    base, _ = mlp()
    stock = tuned(base, tuner(["0"]), other=tuner(["0"]))
    stock.base_model.set_adapter(["default", "other"])
    ours = accelerate(copy.deepcopy(stock))
    last = {boft: "other", oft: "default"}[tuner]  # the layers that ours merges
    for model, broken in ((stock, "other"), (ours, last)):
        layer = model.base_model.model[0]
        parameter = layer.boft_s[broken] if tuner is boft else layer.oft_R[broken].weight
        parameter.data[0] = torch.nan
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            model.merge_adapter(safe_merge=True)
    assert stock.base_model.model[0].merged_adapters == ["default"]
    layer = ours.base_model.model[0]
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight, base[0].weight)


def test_unmerging_a_zero_scale():
    stock = tuned(mlp()[0], boft(["0"]))
    stock.base_model.model[0].boft_s["default"].data[3] = 0
    ours = accelerate(copy.deepcopy(stock))
    for model in (stock, ours):
        model.merge_adapter()
    stock.unmerge_adapter()
    assert stock.base_model.model[0].base_layer.weight.isnan().any()
    x = torch.randn(5, 32)
    y = ours(x)
    with pytest.raises(ValueError, match="expected no zero in order to unmerge"):
        ours.unmerge_adapter()
    assert torch.equal(ours(x), y)


def test_the_dropout_of_oft():
    base, x = mlp()
    stock = tuned(base, oft(module_dropout=0.5))
    for model in (stock, accelerate(copy.deepcopy(stock))):
        assert torch.equal(model.train()(x), model.eval()(x))
