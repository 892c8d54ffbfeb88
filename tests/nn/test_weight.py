"""``weight`` of a rotated layer, as attention, losses and converters read it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from boft_ops import BOFTConv2d, BOFTLinear, MultiAdapterLinear


def trained(layer):
    torch.manual_seed(1)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn_like(parameter)
    return layer


def multi():
    layer = MultiAdapterLinear(nn.Linear(16, 24))
    layer.add_adapter("a", block_size=4)
    layer.add_adapter("b", block_size=8, n_factors=1, scale=False)
    return layer


LAYERS = {
    "in": lambda: BOFTLinear(16, 24, block_size=4),
    "out": lambda: BOFTLinear(16, 24, block_size=4, side="out", scale=False),
    "kaleidoscope": lambda: BOFTLinear(16, 24, block_size=4, kaleidoscope=2),
    "multi": multi,
}


class Product(torch.autograd.Function):
    """A product as fused losses have it: the weight reaches it without a torch function."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


def chunked(x, weight):
    return torch.cat([x @ part.mT for part in weight.chunk(3)], -1)


@pytest.mark.parametrize("product", [F.linear, Product.apply, chunked])
@pytest.mark.parametrize("kind", LAYERS)
def test_products_with_the_weight_are_the_layer_and_train_it(kind, product):
    layer, x = trained(LAYERS[kind]().double()), torch.randn(5, 16, dtype=torch.float64)
    y, want = product(x, layer.weight) + layer.bias, layer(x)
    torch.testing.assert_close(y, want)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y.square().sum(), parameters)
    torch.testing.assert_close(grads, torch.autograd.grad(want.square().sum(), parameters))


def test_the_weight_of_a_convolution():
    conv, x = trained(BOFTConv2d(8, 6, 3, block_size=4, n_factors=1)), torch.randn(1, 8, 5, 5)
    y = F.conv2d(x, conv.weight, conv.bias)
    torch.testing.assert_close(y, conv(x))
    assert torch.autograd.grad(y.sum(), conv.skew)[0].abs().sum() > 0


def test_gradients_of_gradients_and_of_an_unfrozen_weight():
    layer, x = trained(LAYERS["in"]().double()), torch.randn(5, 16, dtype=torch.float64)
    layer.weight.requires_grad_(True)
    parameters = [layer.frozen_weight, layer.skew, layer.scale_offset]
    penalties = []
    for y in (F.linear(x, layer.weight, layer.bias), layer(x)):
        grads = torch.autograd.grad(y.square().sum(), parameters, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        penalties.append((*grads, *torch.autograd.grad(penalty, parameters)))
    torch.testing.assert_close(*penalties)


def test_dropout_is_drawn_once_for_a_weight():
    layer = trained(BOFTLinear(16, 24, block_size=4, p_component=0.5, p_block=0.5))
    weight = layer.weight
    (grad,) = torch.autograd.grad(weight.sum(), layer.skew)
    dropped = grad.abs().sum(-1) == 0  # a dropped block has no gradient
    assert dropped.sum() == 2
    with torch.no_grad():
        layer.skew[dropped] = 0.0
    torch.testing.assert_close(weight.detach(), layer.merged_weight())


def test_reading_shape_dtype_and_device_computes_nothing(monkeypatch):
    layers = [LAYERS["in"](), trained(multi())]
    monkeypatch.setattr("boft_ops.nn.base.merge_weight", None)
    monkeypatch.setattr("boft_ops.nn.adapted_weight.merge_rotations", None)
    for layer in layers:
        weight = layer.weight
        assert (weight.shape, weight.dtype) == ((24, 16), torch.float32)
        assert weight.device.type == "cpu"
        assert weight.size(1) == 16
        assert weight.requires_grad
        assert weight.to("meta").is_meta
    assert layers[1].bias is layers[1].base.bias
    assert (layers[1].dtype, layers[1].device) == (torch.float32, torch.device("cpu"))


def test_the_frozen_weight_is_the_parameter():
    layer = trained(LAYERS["in"]())
    frozen = dict(layer.named_parameters())["weight"]
    assert layer.frozen_weight is frozen
    assert layer.state_dict()["weight"].data_ptr() == frozen.data_ptr()
    assert torch.equal(copy.deepcopy(layer).frozen_weight, frozen)
    layer.reset_parameters()
    assert layer.frozen_weight is frozen
    assert torch.equal(layer.weight, frozen)  # the identity
    assert type(layer.merge().weight) is nn.Parameter


def test_writing_into_the_rotated_weight_raises():
    layer = trained(LAYERS["in"]())
    before = layer.frozen_weight.clone()
    for write in (
        lambda: nn.init.normal_(layer.weight),
        lambda: layer.weight.data.zero_(),
        lambda: layer.weight.data.__setitem__(0, 1.0),
        lambda: torch.add(before, 1, out=layer.weight.data),
    ):
        with pytest.raises(RuntimeError, match="weight: expected no writing"):
            write()
    for made in (layer.weight.detach().clone(), layer.weight.detach() * 0.99):
        with pytest.raises(ValueError, match="would be rotated twice"):
            layer.weight = nn.Parameter(made)
        with pytest.raises(ValueError, match="would be rotated twice"):
            layer.weight.data = made
    assert torch.equal(layer.frozen_weight, before)


@pytest.mark.parametrize("kind", ["in", "multi"])
def test_loaders_ties_and_swaps_mean_the_frozen_weight(kind):
    layer, tied = trained(LAYERS[kind]()), nn.Linear(16, 24).weight
    holder = layer.base if kind == "multi" else layer
    name = "weight" if kind == "multi" else "frozen_weight"
    layer.weight = tied
    assert getattr(holder, name) is tied
    layer.weight.data = torch.ones(24, 16)
    assert torch.equal(tied, torch.ones(24, 16))
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    twin = LAYERS[kind]()
    twin.load_state_dict(state, assign=True)
    twin.load_state_dict(state, assign=True)  # over the same rotation
    x = torch.randn(3, 16)
    assert torch.equal(twin(x), layer(x))


def test_a_weight_that_does_not_exist_raises_when_its_numbers_are_read():
    layer = trained(multi())
    layer.request_index = layer.index_of(["a", None])
    assert layer.weight.dtype == torch.float32
    with pytest.raises(RuntimeError, match="expected a call of the MultiAdapterLinear"):
        layer.weight.sum()
    layer.request_index = None
    layer.set_active([])
    assert layer.weight is layer.base.weight
