"""An accelerated PEFT model computes what PEFT's own does: outputs, every gradient, merged weights.

The oracle is PEFT's own code, with a stand-in for its CUDA extension where m > 1.
"""

import copy

import peft
import pytest
import torch
from peft_models import assert_same, boft, mlp, net, oft, step, tuned
from torch import nn

from boft_ops import cayley
from boft_ops.interop.peft import accelerate, patched
from boft_ops.interop.peft.parameters import boft_blocks, boft_skew

CONVOLUTIONS = ("conv", "point", "hidden", "out")
CASES = {
    "boft": (mlp, boft()),
    "boft_odd_block": (mlp, boft(targets=["2"], b=3)),
    "boft_by_number_of_blocks": (mlp, boft(b=0, boft_block_num=4)),
    "boft_bias": (mlp, boft(bias="boft_only")),
    "boft_dropout": (mlp, boft(p=0.4)),
    "boft_conv": (net, boft(CONVOLUTIONS)),
    "boft_conv_dropout": (net, boft(CONVOLUTIONS, p=0.4)),
    "oft": (mlp, oft()),
    "oft_neumann": (mlp, oft(use_cayley_neumann=True)),
    "oft_three_terms": (mlp, oft(use_cayley_neumann=True, num_cayley_neumann_terms=3)),
    "oft_seven_terms": (mlp, oft(use_cayley_neumann=True, num_cayley_neumann_terms=7)),
    "oft_block_share": (mlp, oft(block_share=True)),
    "oft_coft": (mlp, oft(coft=True, eps=0.05)),
    "oft_coft_neumann": (mlp, oft(coft=True, eps=0.05, use_cayley_neumann=True)),
    "oft_dropout": (mlp, oft(module_dropout=0.5)),
    "oft_bias": (mlp, oft(bias="oft_only")),
    "oft_conv": (net, oft(("point", "hidden"))),
}


def pair(case):
    make, config = CASES[case]
    base, x = make()
    theirs = tuned(base, config)
    return theirs, accelerate(copy.deepcopy(theirs)), x


@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient(case):
    theirs, ours, x = pair(case)
    assert_same(step(ours.train(), x), step(theirs.train(), x))
    assert_same(step(ours.eval(), x), step(theirs.eval(), x))


@pytest.mark.parametrize("terms", [2, 3, 5, 7])
def test_a_series_of_large_blocks_and_many_rows(terms):
    """W would be rotated in the place of x here, were the blocks orthogonal."""
    config = oft(["0"], b=128, use_cayley_neumann=True, num_cayley_neumann_terms=terms)
    theirs = tuned(nn.Sequential(nn.Linear(128, 4)), config)
    nn.init.normal_(theirs.base_model.model[0].oft_R["default"].weight, std=0.03)
    ours, x = accelerate(copy.deepcopy(theirs)), torch.randn(64, 128)
    assert_same(step(ours, x), step(theirs, x))


@pytest.mark.parametrize("case", CASES)
def test_merging(case):
    theirs, ours, x = pair(case)
    before = ours.eval()(x)
    for model in (theirs, ours):
        model.merge_adapter(safe_merge=True)
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-5)
    assert not any(getattr(m, "merged", False) for m in ours.modules())


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_many_factors(peft_extension, m, kind):
    base, x = mlp() if kind == "linear" else net()
    config = boft(["0"] if kind == "linear" else ["point"], b=2, m=m, p=0.3)
    theirs = tuned(base, config)  # with the stand-in
    ours = accelerate(copy.deepcopy(theirs))
    assert_same(step(ours, x), step(theirs, x))
    for model in (theirs, ours):
        model.merge_adapter()
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, rtol=1e-5, atol=1e-6)


def test_delta_weight_is_that_of_peft(peft_extension):
    for config in (boft(b=4, m=2), oft()):
        theirs = tuned(mlp()[0], config)
        ours = accelerate(copy.deepcopy(theirs))
        want, got = (
            model.base_model.model[0].get_delta_weight("default") for model in (theirs, ours)
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_same_training(peft_extension):
    """Ten steps of AdamW with dropout: the same masks from the same seed."""
    base, x = mlp()
    theirs = tuned(base, boft(m=2, p=0.4, init_weights=True))
    ours = accelerate(copy.deepcopy(theirs))
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][-1] < 0.8 * losses[1][0]


@pytest.mark.parametrize("tuner", [boft, oft])
def test_several_active_adapters(tuner):
    base, x = mlp()
    theirs = tuned(base, tuner(), other=tuner())
    ours = accelerate(copy.deepcopy(theirs))
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "other"])
    assert_same(step(ours, x), step(theirs, x))
    before = ours(x)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-5)


def test_several_active_adapters_draw_the_masks_of_peft():
    base, x = mlp()
    theirs = tuned(base, boft(p=0.4), other=boft(p=0.4))
    ours = accelerate(copy.deepcopy(theirs))
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "other"])
    assert_same(step(ours, x), step(theirs, x))


def error(model, exact, x):
    return (model(x).double() - exact).abs().mean().item()


@pytest.mark.parametrize("case", ["boft", "oft", "oft_neumann", "boft_conv", "oft_conv"])
def test_bfloat16_is_no_worse_than_peft(case):
    theirs, _, x = pair(case)
    theirs = theirs.eval().to(torch.bfloat16)
    for parameter in theirs.parameters():  # as PEFT keeps them
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    ours = accelerate(copy.deepcopy(theirs))
    x = torch.randn(64, *x.shape[1:]).bfloat16()
    exact = copy.deepcopy(theirs).double()(x.double())
    with torch.no_grad():
        got, want = ours(x), theirs(x)
        assert got.dtype == want.dtype == torch.bfloat16
        assert error(ours, exact, x) <= 1.02 * error(theirs, exact, x)


@pytest.mark.parametrize("case", ["boft", "oft_neumann", "boft_conv", "oft_conv"])
def test_autocast_is_no_worse_than_peft(case):
    theirs, ours, x = pair(case)
    x = torch.randn(64, *x.shape[1:])
    exact = copy.deepcopy(theirs).eval().double()(x.double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for model in (theirs, ours):
            model.eval()
        assert ours(x).dtype == theirs(x).dtype
        assert error(ours, exact, x) <= 1.02 * error(theirs, exact, x)


class Doubled(nn.Linear):
    """A base layer with a forward of its own, and an argument that PEFT passes on."""

    def forward(self, x, factor=2.0):
        return factor * super().forward(x)


@pytest.mark.parametrize("tuner", [boft, oft])
def test_base_with_a_forward_of_its_own(tuner):
    theirs = tuned(nn.Sequential(Doubled(32, 24)), tuner(["0"]))
    ours = accelerate(copy.deepcopy(theirs))
    x = torch.randn(5, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    ours, theirs = (model.base_model.model[0] for model in (ours, theirs))
    torch.testing.assert_close(ours(x, factor=3.0), theirs(x, factor=3.0), rtol=1e-5, atol=1e-5)


def test_hooks_of_the_base_run():
    theirs = tuned(mlp()[0], boft())
    ours = accelerate(copy.deepcopy(theirs))
    x, seen = torch.randn(5, 32), []
    for model in (theirs, ours):
        layer = model.base_model.model[0].base_layer
        layer.register_forward_hook(lambda *call: seen.append(call[1][0]))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-5, atol=1e-5)


def test_patched_equals_accelerated():
    base, x = mlp()
    with patched():
        made = tuned(base, boft())
    later = accelerate(tuned(base, boft()))
    later.load_state_dict(made.state_dict())
    assert torch.equal(made(x), later(x))
    assert type(made.base_model.model[0]) is type(later.base_model.model[0])


def test_the_parameter_as_skew():
    """PEFT's block is (I - S)(I + S)^-1 with S = (A - A^T)/2; gradients of gradients, vmap."""
    a = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    s, eye = (a - a.mT) / 2, torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(cayley(boft_skew(a)), (eye - s) @ torch.linalg.inv(eye + s))
    assert torch.autograd.gradcheck(boft_skew, a)
    assert torch.autograd.gradgradcheck(boft_skew, a)
    assert torch.equal(torch.func.vmap(boft_skew)(a[None]), boft_skew(a)[None])
    skew = boft_skew(a)
    torch.testing.assert_close(boft_skew(boft_blocks(skew)), skew)


def test_the_parameter_as_skew_first_in_inference_mode():
    """Anything kept from the first call must not forbid gradients of later ones."""
    a = torch.randn(1, 2, 10, 10, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        boft_skew(a)
    assert torch.autograd.gradgradcheck(boft_skew, a)


def test_gradients_of_gradients():
    """Through a whole layer."""
    model = accelerate(tuned(mlp()[0], boft(["0"]))).double()
    layer, x = model.base_model.model[0], torch.randn(2, 32, dtype=torch.float64)
    parameters = layer.boft_R["default"], layer.boft_s["default"]

    def run(*values):
        names = ("boft_R.default", "boft_s.default")
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    torch.autograd.gradgradcheck(run, parameters, fast_mode=True)


def test_lora_beside_oft():
    """A mixed model: the base layer of one is the layer of the other."""
    base, x = mlp()
    theirs = peft.get_peft_model(copy.deepcopy(base), oft(), mixed=True)
    theirs.add_adapter("lora", peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    theirs.set_adapter(["default", "lora"])
    ours = accelerate(copy.deepcopy(theirs))
    assert_same(step(ours, x), step(theirs, x))
