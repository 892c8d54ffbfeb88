"""param_groups: a step of AdamW changes R equally, whatever the block size and the factors."""

import copy
import math

import pytest
import torch
from peft import BOFTConfig, OFTConfig, get_peft_model
from torch import nn

from boft_ops import (
    BOFTLinear,
    MultiAdapterLinear,
    adapt,
    butterfly_matmul,
    cayley,
    param_groups,
)
from boft_ops.interop.peft import accelerate, patched
from boft_ops.ops.kaleidoscope import multiply

LR = 1e-4
TURN = 2 * math.sqrt(20)  # radians for each unit of lr, those of BOFT(2, 8)


def rotate(x, layer):
    return multiply(x, cayley(layer.skew), layer.kaleidoscope)


def turns(layer, steps=1, spread=0.0, optimizer=None):
    """The angles, root mean square over random vectors, by which each of the steps turns R."""
    d = layer.in_features
    nn.init.normal_(layer.skew, std=spread)
    optimizer = optimizer or torch.optim.AdamW(param_groups(layer, LR), lr=LR)
    probes = torch.randn(8, d)
    target = torch.randn(d, 16) / math.sqrt(d)
    before, found = rotate(probes, layer).detach(), []
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(32, d)
        (rotate(x, layer) @ target * torch.randn(32, 16)).sum().backward()
        optimizer.step()
        after = rotate(probes, layer).detach()
        found.append(((after - before).norm() / before.norm()).item())
        before = after
    return found


def is_large(block_size, n_factors):
    return block_size * 2**n_factors > 256


@pytest.mark.exhaustive_if(condition=is_large)
@pytest.mark.parametrize("n_factors", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("block_size", [4, 8, 16, 32, 64, 128, 256])
def test_a_step_turns_every_rotation_equally(block_size, n_factors):
    torch.manual_seed(0)
    d = max(block_size << (n_factors - 1), 512)  # many features, so that the mean is steady
    layer = BOFTLinear(d, 1, block_size=block_size, n_factors=n_factors, scale=False)
    assert turns(layer)[0] / LR == pytest.approx(TURN, rel=0.1)


@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_later_steps_turn_equally(spread):
    """Also away from the identity, where the factors no longer commute."""
    torch.manual_seed(0)
    found = []
    for block_size, n_factors in ((8, 1), (8, 2), (4, 4), (32, 3)):
        layer = BOFTLinear(512, 1, block_size=block_size, n_factors=n_factors, scale=False)
        found.append(sum(turns(layer, 8, spread)))
    assert max(found) / min(found) < 1.1


def test_a_kaleidoscope_turns_as_a_butterfly():
    torch.manual_seed(0)
    layer = BOFTLinear(512, 1, block_size=8, n_factors=3, scale=False, kaleidoscope=2)
    assert turns(layer)[0] / LR == pytest.approx(TURN, rel=0.1)


def test_one_rate_without_groups_does_not():
    """AdamW's own rate turns BOFT(4, 32) several times as far as OFT with blocks of 4."""
    torch.manual_seed(0)
    found = []
    for block_size, n_factors in ((4, 1), (32, 4)):
        layer = BOFTLinear(512, 1, block_size=block_size, n_factors=n_factors, scale=False)
        found += turns(layer, optimizer=torch.optim.AdamW([layer.skew], lr=LR))
    assert found[1] / found[0] > 5


def test_groups():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 2))
    options = {"0": {"block_size": 8}, "1": {"block_size": 4}, "2": {"scale": False}}
    adapt(model, options, modules_to_save=["3"])
    groups = param_groups(model, 1e-3, weight_decay=0.1)
    skews, small, scales, others = (group["params"] for group in groups)
    assert [g["lr"] for g in groups] == pytest.approx(
        [1e-3, 1e-3 * math.sqrt(20 / (4 + 4)), 1e-3, 1e-3]
    )
    assert groups[0]["lr"] == 1e-3  # the default butterfly trains as without groups, exactly
    assert [g["weight_decay"] for g in groups] == [0, 0, 0, 0.1]
    assert [id(p) for p in skews] == [id(model[0].skew), id(model[2].skew)]
    assert [id(p) for p in small] == [id(model[1].skew)]
    assert [id(p) for p in scales] == [id(model[0].scale_offset), id(model[1].scale_offset)]
    assert [id(p) for p in others] == [id(model[3].weight), id(model[3].bias)]


def test_frozen_and_shared_parameters_and_adapters():
    layer = BOFTLinear(16, 16)
    model = nn.ModuleList([layer, nn.Sequential(layer), MultiAdapterLinear(nn.Linear(16, 4))])
    model[2].add_adapter("one", block_size=16, n_factors=1)
    layer.scale_offset.requires_grad_(False)
    groups = param_groups(model, 1e-3)
    adapter = model[2].adapters["one"]
    expected = [layer.skew, adapter.skew, adapter.scale_offset]
    assert [id(p) for g in groups for p in g["params"]] == [id(p) for p in expected]
    torch.optim.AdamW(groups)  # refuses a parameter that is in two groups


def test_the_scaled_form_trains_as_its_skew_does():
    """OneTrainer stores 2 sqrt(b - 1) skew, so its rate is the angle of a step in radians."""
    torch.manual_seed(0)
    block_size, steps = 16, 5
    factor = 2 * math.sqrt(block_size - 1)
    layer = BOFTLinear(64, 1, block_size=block_size, n_factors=1, scale=False).double()
    stored = nn.Parameter(torch.zeros_like(layer.skew[0]))
    ours = torch.optim.AdamW(param_groups(layer, LR), lr=LR, eps=0)
    theirs = torch.optim.AdamW([stored], lr=LR * TURN, eps=0, weight_decay=0)
    for _ in range(steps):
        x, target = torch.randn(2, 8, 64, dtype=torch.float64)
        for skew in (layer.skew, stored[None] / factor):
            (butterfly_matmul(x, cayley(skew)) * target).sum().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(stored[None] / factor, layer.skew)
    assert layer.skew.abs().max() > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: param_groups("model", 1e-3), TypeError, "model: expected an nn.Module"),
        (lambda: param_groups(BOFTLinear(16, 8), "1e-3"), TypeError, "lr: expected a positive"),
        (lambda: param_groups(BOFTLinear(16, 8), 0.0), ValueError, "lr: expected a positive"),
        (lambda: param_groups(BOFTLinear(16, 8), math.nan), ValueError, "lr: expected a positive"),
        (
            lambda: param_groups(BOFTLinear(16, 8), 1.0, weight_decay=-1),
            ValueError,
            "weight_decay: expected a non-negative number, got -1",
        ),
        (lambda: param_groups(nn.Linear(8, 8), 1e-3), ValueError, "model: expected a BOFT layer"),
        (
            lambda: param_groups(BOFTLinear(16, 8).requires_grad_(False), 1e-3),
            ValueError,
            "whose skew requires a gradient, got none",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


PEFT_CONFIGS = {
    "boft": BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=1, target_modules=["0"]),
    "boft_4": BOFTConfig(boft_block_size=16, boft_n_butterfly_factor=4, target_modules=["0"]),
    "oft": OFTConfig(oft_block_size=32, use_cayley_neumann=False, target_modules=["0"]),
    "oft_series": OFTConfig(oft_block_size=16, target_modules=["0"]),
    "oft_shared": OFTConfig(oft_block_size=8, block_share=True, target_modules=["0"]),
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_a_step_turns_the_rotations_of_peft_equally(name):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(512, 512, bias=False))
    nn.init.eye_(base[0].weight)  # the model multiplies by R
    with patched():
        model = get_peft_model(base, copy.deepcopy(PEFT_CONFIGS[name]))
    groups = param_groups(model, LR)
    trained = {p for p in model.parameters() if p.requires_grad}
    assert {p for group in groups for p in group["params"]} == trained
    assert [group["weight_decay"] for group in groups] == [0.0] * len(groups)
    for group in groups[1:]:  # the scales, which would change lengths
        assert group["lr"] == LR
        for parameter in group["params"]:
            parameter.requires_grad_(False)
    probes, x, target = torch.randn(8, 512), torch.randn(32, 512), torch.randn(512, 16)
    before = model(probes).detach()
    (model(x) @ target * torch.randn(32, 16)).sum().backward()
    torch.optim.AdamW(groups[:1]).step()
    found = ((model(probes) - before).norm() / before.norm()).item()
    assert found / LR == pytest.approx(TURN, rel=0.1)


def test_groups_of_a_peft_model():
    """The rates go by the shapes, and a head is no rotation; stock layers have the same groups."""
    config = {"target_modules": ["0", "1"], "modules_to_save": ["2"]}
    config |= {"boft_block_size": 4, "boft_n_butterfly_factor": 1}
    base = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 2))
    model = get_peft_model(base, BOFTConfig(**config))
    layers = [m for m in model.modules() if hasattr(m, "boft_R")]
    for accelerated in (False, True):
        if accelerated:
            accelerate(model)
        skews, scales, others = param_groups(model, 1e-3, weight_decay=0.1)
        assert skews["lr"] == pytest.approx(1e-3 * math.sqrt(20 / 3))
        assert (scales["lr"], others["lr"]) == (1e-3, 1e-3)
        assert [g["weight_decay"] for g in (skews, scales, others)] == [0, 0, 0.1]
        assert [id(p) for p in skews["params"]] == [id(m.boft_R["default"]) for m in layers]
        assert [id(p) for p in scales["params"]] == [id(m.boft_s["default"]) for m in layers]
        assert {tuple(p.shape) for p in others["params"]} == {(2, 32), (2,)}
