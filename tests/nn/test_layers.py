"""The modules: construction, sharing, merging, interpolation, convolution, bad options."""

import copy
import io

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from boft_ops import BOFTConv2d, BOFTLinear, OFTLinear, cayley
from boft_ops.ops.butterfly import butterfly_matmul

SIDES = ["in", "out"]


def randomise(layer, std=0.2):
    nn.init.normal_(layer.skew, std=std)
    if layer.scale_offset is not None:
        nn.init.normal_(layer.scale_offset, std=0.2)
    return layer


def linear_pair(side="in", dtype=torch.float32, bias=True, **options):
    linear = nn.Linear(48, 32, bias=bias, dtype=dtype)
    return linear, BOFTLinear.from_linear(linear, side=side, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_starts_as_the_frozen_layer_bit_for_bit(side, scale, bias):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        linear, layer = linear_pair(side, dtype, bias, scale=scale)
        x = torch.randn(5, 48, dtype=dtype)
        assert torch.equal(layer(x), linear(x))
        assert torch.equal(layer.merged_weight(), linear.weight)


def test_from_linear_shares_storage_and_leaves_the_source_alone():
    linear, layer = linear_pair()
    assert layer.frozen_weight.data_ptr() == linear.weight.data_ptr()
    assert layer.bias.data_ptr() == linear.bias.data_ptr()
    assert linear.weight.requires_grad
    assert linear.bias.requires_grad
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"skew", "scale_offset"}
    before = linear.weight.clone()
    randomise(layer).eval().merge()
    assert torch.equal(linear.weight, before)  # merging made its own weight
    assert not torch.equal(layer.frozen_weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_parameters_are_at_least_float32(dtype):
    _, layer = linear_pair(dtype=dtype)
    assert layer.skew.dtype == layer.scale_offset.dtype == torch.float32
    assert layer.skew.shape == (2, 6, 28)
    assert layer.n_effective_parameters == 2 * 48 * 7 // 2 + 32
    layer.bias.requires_grad_(True)
    assert layer.n_effective_parameters == 2 * 48 * 7 // 2 + 64


@pytest.mark.parametrize("method", ["exact", "neumann5"])
@pytest.mark.parametrize("side", SIDES)
def test_merged_weight_is_the_definition(side, method):
    _, layer = linear_pair(side, torch.float64, method=method)
    randomise(layer, std=0.05)
    blocks = cayley(layer.skew.detach(), method=method)
    expected = reference.merged_weight(layer.frozen_weight, blocks, layer.scale, side)
    torch.testing.assert_close(layer.merged_weight(), expected)
    torch.testing.assert_close(layer.rotation(), reference.rotation(blocks))
    x = torch.randn(3, 48, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, expected, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["exact", "neumann5"])
@pytest.mark.parametrize("side", SIDES)
def test_merge_and_unmerge(side, method, dtype):
    linear, layer = linear_pair(side, dtype, method=method)
    randomise(layer, std=0.05).eval()
    x = torch.randn(3, 48, dtype=dtype)
    y = layer(x)
    eps = torch.finfo(dtype).eps
    assert layer.merge(keep=False) is layer
    torch.testing.assert_close(layer(x), y, rtol=0, atol=16 * eps)
    torch.testing.assert_close(layer.merged_weight(), layer.weight)
    layer.unmerge()
    torch.testing.assert_close(layer.frozen_weight, linear.weight, rtol=0, atol=4 * eps)
    torch.testing.assert_close(layer(x), y, rtol=0, atol=16 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_the_weight_bit_for_bit(dtype):
    linear, layer = linear_pair(dtype=dtype)
    for _ in range(3):
        randomise(layer).merge()
        with torch.no_grad():
            layer.scale_offset[3] = -1  # no division could undo it
        layer = copy.deepcopy(layer)
        layer.unmerge()
    assert torch.equal(layer.frozen_weight, linear.weight)
    shared = layer.frozen_weight
    layer.merge()
    layer.merged_layer()
    assert layer.unmerge().frozen_weight is shared  # tied weights stay tied
    moved = layer.merge().double().unmerge()
    assert torch.equal(moved.frozen_weight, linear.weight.double())


def test_a_loaded_state_replaces_the_weight_that_merging_put_aside():
    layer, other = randomise(linear_pair()[1]), randomise(linear_pair()[1])
    nn.init.normal_(other.frozen_weight)
    want = other.frozen_weight.clone()
    layer.merge().load_state_dict(other.merge().state_dict())
    torch.testing.assert_close(layer.unmerge().frozen_weight, want, rtol=1e-4, atol=1e-5)


def test_merging_rounds_once_whatever_the_adapters_dtype():
    layer = randomise(BOFTLinear(64, 64, bias=False)).bfloat16()
    exact = copy.deepcopy(layer).double().merged_weight()
    assert (layer.merged_weight() - exact).norm() <= 1.1 * (exact.bfloat16() - exact).norm()


def test_merge_under_autocast_is_exact():
    _, layer = linear_pair()
    randomise(layer)
    expected = layer.merged_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.merged_weight(), expected)


def test_merging_twice_training_merged_and_zero_scales_are_errors():
    _, layer = linear_pair()
    with pytest.raises(RuntimeError, match="unmerge: expected a merged layer"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="merge: expected an unmerged layer"):
        layer.merge()
    with pytest.raises(RuntimeError, match="interpolate: expected an unmerged layer"):
        layer.interpolate(1)
    with pytest.raises(RuntimeError, match=r"expected unmerge\(\) before training"):
        layer(torch.randn(2, 48))
    with torch.no_grad():
        layer(torch.randn(2, 48))
    layer.unmerge()
    with torch.no_grad():
        layer.scale_offset[3] = -1
    layer.merge(keep=False)
    with pytest.raises(ValueError, match="scale: expected no zero"):
        layer.unmerge()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_unmerging_undoes_what_was_merged(kind):
    """Whatever an optimizer or a file has made of skew and scale since."""
    layer = linear_pair()[1] if kind == "linear" else BOFTConv2d(8, 4, 2, block_size=4)
    weight = randomise(layer).eval().frozen_weight.clone()
    for change in (
        randomise,
        lambda layer: layer.load_state_dict({"skew": layer.skew + 1}, strict=False),
        lambda layer: randomise(layer.double().float()),
    ):
        change(layer.merge(keep=False))
        torch.testing.assert_close(layer.unmerge().frozen_weight, weight, rtol=1e-4, atol=1e-5)
    twin = randomise(copy.deepcopy(layer.merge(keep=False)))
    torch.testing.assert_close(twin.unmerge().frozen_weight, weight, rtol=1e-4, atol=1e-5)


def test_the_state_of_a_merged_layer_has_what_was_merged():
    layer = randomise(linear_pair()[1]).eval()
    weight, fresh = layer.frozen_weight.clone(), linear_pair()[1]
    randomise(layer.merge())
    fresh.load_state_dict(layer.state_dict())
    randomise(fresh)
    state = {k: v for k, v in fresh.state_dict().items() if k != "weight"}
    torch.testing.assert_close(fresh.unmerge().frozen_weight, weight, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"_extra_state: expected merged=False"):
        fresh.load_state_dict(state, strict=False)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_state_dict_remembers_merging(kind):
    if kind == "linear":
        layer, fresh = linear_pair()[1], linear_pair()[1]
    else:
        layer, fresh = (BOFTConv2d(8, 4, 2, block_size=4) for _ in range(2))
    randomise(layer).eval().merge()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.merged
    torch.testing.assert_close(fresh.unmerge().frozen_weight, layer.unmerge().frozen_weight)


@pytest.mark.parametrize("side", SIDES)
def test_interpolation(side):
    """The largest strides become the identity first; nothing is lost."""
    _, layer = linear_pair(side, torch.float64, n_factors=3, block_size=4, scale=False)
    randomise(layer)
    for n in (0, 1, 2, 3):
        layer.interpolate(n)
        kept = layer.skew.detach().clone()
        kept[3 - n :] = 0
        expected = reference.rotation(cayley(kept))
        torch.testing.assert_close(layer.rotation(), expected)
        x = torch.randn(2, 48, dtype=torch.float64)
        torch.testing.assert_close(layer(x), F.linear(x, layer.merged_weight(), layer.bias))
    torch.testing.assert_close(layer.merged_weight(), layer.frozen_weight)
    assert layer.interpolate(0).rotation().sub(torch.eye(len(expected))).abs().max() > 0.1
    for bad in (-1, 4, 1.0, True):
        with pytest.raises(ValueError, match=r"n: expected an int in \[0, 3\]"):
            layer.interpolate(bad)


def test_oft_linear_is_the_one_factor_case():
    linear = nn.Linear(45, 8)
    layer = randomise(OFTLinear.from_linear(linear, block_size=5))
    assert layer.skew.shape == (1, 9, 10)
    x = torch.randn(3, 45)
    blocks = torch.block_diag(*cayley(layer.skew.detach())[0])
    merged = layer.scale.detach()[:, None] * linear.weight @ blocks.T
    torch.testing.assert_close(layer(x), F.linear(x, merged, linear.bias))
    assert isinstance(OFTLinear(8, 8), BOFTLinear)
    with pytest.raises(TypeError, match="n_factors: OFTLinear has exactly one"):
        OFTLinear(8, 8, n_factors=2)


CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": (1, 4)},
    {"kernel_size": 1, "bias": False},
    {"groups": 2},
    {"groups": 4, "padding": "same"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (0, 1), "padding_mode": "circular"},
]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_conv2d(shape, side):
    conv = nn.Conv2d(**{"in_channels": 16, "out_channels": 8, "kernel_size": 2, **shape}).double()
    layer = BOFTConv2d.from_conv(conv, block_size=4, side=side)
    x = torch.randn(2, 16, 7, 6, dtype=torch.float64)
    assert torch.equal(layer(x), conv(x))
    randomise(layer)
    matrix = conv.weight.detach().flatten(1)
    merged = reference.merged_weight(matrix, cayley(layer.skew), layer.scale, side)
    plain = copy.deepcopy(conv)
    plain.weight = nn.Parameter(merged.detach().reshape(conv.weight.shape))
    y = layer(x)
    torch.testing.assert_close(y, plain(x))
    upstream = torch.randn_like(y)
    functional = torch.func.functional_call(
        plain, {"weight": merged.reshape(conv.weight.shape)}, (x,)
    )
    trained = (layer.skew, layer.scale_offset)
    got = torch.autograd.grad(y, trained, upstream)
    for g, w in zip(got, torch.autograd.grad(functional, trained, upstream), strict=True):
        torch.testing.assert_close(g, w)
    layer.eval().merge()
    torch.testing.assert_close(layer(x), y)


def test_conv2d_under_autocast_and_channels_last():
    layer = randomise(BOFTConv2d(16, 8, 3, padding=1, block_size=4))
    x = torch.randn(2, 16, 5, 5)
    y = layer(x)
    last = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.05)


def test_dropout_in_training_only():
    _, layer = linear_pair(p_component=1.0, p_block=1.0, scale=False)
    randomise(layer)
    x = torch.randn(3, 48)
    plain = F.linear(x, layer.frozen_weight, layer.bias)
    torch.testing.assert_close(layer(x), plain)
    assert not torch.allclose(layer.eval()(x), plain)
    conv = randomise(BOFTConv2d(8, 4, 2, block_size=4, p_component=1.0, p_block=1.0, scale=False))
    image = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(conv(image), F.conv2d(image, conv.weight, conv.bias))


def test_dropout_can_be_switched_off_alone():
    for layer, x in (
        (BOFTLinear(16, 8, p_component=1.0, p_block=1.0), torch.randn(2, 16)),
        (BOFTConv2d(8, 4, 2, block_size=4, p_component=1.0, p_block=1.0), torch.randn(1, 8, 4, 4)),
    ):
        randomise(layer)
        expected = layer.eval()(x)
        layer.train()
        layer.dropout.eval()
        torch.testing.assert_close(layer(x), expected)


def test_reset_parameters_after_meta():
    layer = BOFTLinear(16, 8, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), F.linear(x, layer.frozen_weight, layer.bias))


def test_state_dict_remembers_interpolation():
    layer, fresh = (linear_pair(n_factors=3, block_size=4)[1] for _ in range(2))
    randomise(layer).eval()
    pretrained = layer.frozen_weight.clone()
    layer.interpolate(2).merge()
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh.unmerge().frozen_weight, pretrained)


def test_what_would_be_lost_is_refused():
    class OwnForward(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(TypeError, match=r"OwnForward with its own forward\(\)"):
        BOFTLinear.from_linear(OwnForward(8, 8))
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="without hooks and parametrizations"):
        BOFTLinear.from_linear(hooked)
    patched = nn.Linear(8, 8)
    patched.forward = patched.forward
    with pytest.raises(ValueError, match=r"class's forward\(\)"):
        BOFTLinear.from_linear(patched)
    with pytest.raises(ValueError, match="without hooks and parametrizations"):
        BOFTConv2d.from_conv(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)))


def test_training_moves_the_weight_on_the_sphere():
    linear, layer = linear_pair(scale=False)
    optimizer = torch.optim.SGD([layer.skew], lr=0.5)
    x, target = torch.randn(64, 48), torch.randn(64, 32)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    merged = layer.merged_weight()
    assert not torch.allclose(merged, linear.weight, atol=1e-3)
    torch.testing.assert_close(torch.linalg.svdvals(merged), torch.linalg.svdvals(linear.weight))


def test_copies_and_meta():
    layer = randomise(BOFTLinear(16, 16, p_component=0.5, p_block=0.25))
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 16)
    torch.testing.assert_close(twin.eval()(x), layer.eval()(x))
    assert twin.options() == layer.options()
    meta = BOFTLinear(16, 16, device="meta", dtype=torch.bfloat16)
    assert meta(torch.empty(3, 16, device="meta", dtype=torch.bfloat16)).shape == (3, 16)
    assert "block_size=8, n_factors=2, side='in', scale=True, p_component=0.5" in repr(layer)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"block_size": 7}, ValueError, r"block_size: expected a divisor of 48.*Nearest valid"),
        ({"block_size": 3}, ValueError, "block_size: expected an even number for n_factors=2"),
        ({"n_factors": 3}, ValueError, r"n_factors: expected 48/8 = 6 blocks.*\(2, 8\)"),
        ({"n_factors": 10**20}, ValueError, "n_factors: expected"),
        ({"block_size": 10**400}, ValueError, "block_size: expected a divisor"),
        ({"scale": "no"}, TypeError, "scale: expected a bool, got 'no'"),
        ({"n_factors": 0}, ValueError, "n_factors: expected a positive int, got 0"),
        ({"block_size": 8.0}, TypeError, "block_size: expected a positive int, got 8.0"),
        ({"side": "both"}, ValueError, "side: expected one of"),
        ({"method": "neumann"}, ValueError, "method: expected one of"),
        ({"p_block": -1}, ValueError, "p_block: expected a number"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        BOFTLinear(48, 32, **options)
    with pytest.raises(error, match=match):
        BOFTLinear.from_linear(nn.Linear(48, 32), **options)
    with pytest.raises(error, match=match):
        BOFTConv2d(12, 8, 2, **options)


def test_the_message_offers_choices_that_work():
    with pytest.raises(ValueError, match="Nearest valid") as caught:
        BOFTLinear(11008, 8, block_size=8, n_factors=12)
    choices = str(caught.value).rpartition(": ")[2]
    pairs = [tuple(map(int, c.strip("()").split(", "))) for c in choices.split("), (")]
    assert len(pairs) == 4
    for m, b in pairs:
        BOFTLinear(11008, 8, block_size=b, n_factors=m)


def test_wrong_source():
    with pytest.raises(TypeError, match=r"linear: expected an nn.Linear, got Conv2d"):
        BOFTLinear.from_linear(nn.Conv2d(4, 4, 1))
    with pytest.raises(TypeError, match=r"conv: expected an nn.Conv2d, got Linear"):
        BOFTConv2d.from_conv(nn.Linear(4, 4))


def test_rotation_is_orthogonal_with_determinant_one():
    layer = randomise(BOFTLinear(64, 8, n_factors=4, block_size=8, dtype=torch.float64))
    r = layer.rotation()
    torch.testing.assert_close(r.T @ r, torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.det(r), torch.ones((), dtype=torch.float64))
    assert (r != 0).all()  # a maximal butterfly is dense
    y = butterfly_matmul(torch.eye(64, dtype=torch.float64), cayley(layer.skew))
    torch.testing.assert_close(r, y)
