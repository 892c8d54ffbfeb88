"""Rotations over quantized linear layers: torchao's, bitsandbytes', and one of packed integers."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from boft_ops import BOFTLinear, MultiAdapterLinear, adapt, load_adapter, merge, save_adapter
from boft_ops.nn.base_modules import dense_weight, is_quantized


class PackedLinear(nn.Module):
    """As GPTQ's and AWQ's: packed integers, scales for each output, no weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, (self.qweight * self.scales).to(x.dtype), self.bias)


def torchao8(linear):
    quantization = pytest.importorskip("torchao.quantization")
    box = nn.Sequential(copy.deepcopy(linear))
    quantization.quantize_(box, quantization.Int8WeightOnlyConfig())
    return box[0]


def torchao4(linear):
    quantization = pytest.importorskip("torchao.quantization")
    box = nn.Sequential(copy.deepcopy(linear))
    groups = quantization.PerGroup(32)
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups)
    quantization.quantize_(box, config)
    return box[0]


def bitsandbytes4(linear):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def bitsandbytes8(linear):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


QUANTIZERS = {
    "torchao int8": torchao8,
    "torchao int4": torchao4,
    "bitsandbytes nf4": bitsandbytes4,
    "bitsandbytes int8": bitsandbytes8,
    "packed": PackedLinear,
}
# Error of 8-bit bitsandbytes, which rounds the activations, too; the others are exact
TOLERANCE = {"bitsandbytes int8": 0.05}


@pytest.fixture(params=QUANTIZERS)
def quantized(request):
    """A model with a quantized layer, and the tolerance of its products.

    In training mode: in evaluation bitsandbytes' 4 bits on a CPU are a kernel without a gradient.
    """
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    model[0] = QUANTIZERS[request.param](model[0])
    return model.train(), TOLERANCE.get(request.param, 1e-4)


def trained(model, **options):
    adapt(model, ["0"], **options)
    for parameter in model[0].adapters["default"].parameters():
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def weight_of(base):
    """The weight that the layer multiplies with, found by calling it."""
    with torch.no_grad():
        bias = 0 if base.bias is None else base.bias
        return (base(torch.eye(64)) - bias).T.float()


def test_which_layers_are_quantized(quantized):
    model, _ = quantized
    assert is_quantized(model[0])
    for plain in (nn.Linear(4, 4), nn.Linear(4, 4).bfloat16(), nn.Conv2d(4, 4, 1), nn.ReLU(),
                  BOFTLinear(16, 8), nn.Embedding(4, 4), nn.BatchNorm1d(4)):  # fmt: skip
        assert not is_quantized(plain)


def test_forward_and_gradients(quantized):
    """As the dense layer with the weight that the quantized one stands for."""
    model, tolerance = quantized
    base, x = model[0], torch.randn(6, 64, requires_grad=True)
    start = model(x)
    adapt(model, ["0"], block_size=8)
    assert isinstance(model[0], MultiAdapterLinear)
    assert model[0].base is base
    assert torch.equal(model(x), start)
    trained_names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained_names == {"0.adapters.default.skew", "0.adapters.default.scale_offset"}

    adapter = model[0].adapters["default"]
    nn.init.normal_(adapter.skew, std=0.2)
    nn.init.normal_(adapter.scale_offset, std=0.2)
    dense = nn.Linear(64, 32)
    dense.weight.data, dense.bias.data = weight_of(base), base.bias.detach().float()
    twin = BOFTLinear.from_linear(dense, block_size=8)
    own = {"skew": adapter.skew.detach(), "scale_offset": adapter.scale_offset.detach()}
    twin.load_state_dict(own, strict=False)
    upstream = torch.randn(6, 32)
    grads = []
    for layer, own in ((model[0], adapter), (twin, twin)):
        y = layer(x)
        trained_tensors = x, own.skew, own.scale_offset
        grads.append((y, *torch.autograd.grad(y, trained_tensors, upstream)))
    for got, want in zip(*grads, strict=True):
        error = (got - want).abs().max() / want.abs().max()
        assert error <= tolerance, error


def test_training_step(quantized):
    model, _ = quantized
    trained(model, block_size=8, p_component=0.5, p_block=0.5).train()
    before = {n: copy.deepcopy(t) for n, t in model[0].base.state_dict().items()
              if isinstance(t, torch.Tensor)}  # fmt: skip
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(6, 64)).square().sum().backward()
    skew = model[0].adapters["default"].skew
    old = skew.detach().clone()
    optimizer.step()
    assert not torch.equal(skew, old)
    after = model[0].base.state_dict()
    for name, tensor in before.items():
        packed = hasattr(tensor, "qdata")  # torchao's, which know no comparison
        plain = [t.dequantize() if packed else t for t in (tensor, after[name])]
        assert torch.equal(*plain), name


def test_merging_refuses_or_requantizes(quantized, request):
    model, _ = quantized
    how = QUANTIZERS[request.node.callspec.params["quantized"]]
    trained(model)
    layer, x = model[0], torch.randn(6, 64)
    want = layer(x)
    with pytest.raises(ValueError, match="merging has to quantize it again"):
        merge(model)
    assert model[0] is layer
    if how is PackedLinear:
        with pytest.raises(ValueError, match="a weight that can be made dense"):
            merge(model, requantize=PackedLinear)
        return
    assert (dense_weight(layer.base) - weight_of(layer.base)).abs().max() < 0.02
    seen = []

    def requantize(linear):
        seen.append(linear)
        return how(linear)

    merge(model, requantize=requantize)
    assert is_quantized(model[0])
    assert type(seen[0]) is nn.Linear
    scale = want.abs().max()
    assert (seen[0](x) - want).abs().max() / scale < 0.03  # dense: but for int8 activations exact
    limit = 0.3 if how in (bitsandbytes4, torchao4) else 0.05
    assert (model[0](x) - want).abs().max() / scale < limit  # the rounding of quantizing again


def test_adapter_files(quantized, tmp_path):
    """The same names as over a dense layer: one file for both."""
    model, _ = quantized
    fresh = copy.deepcopy(model)
    trained(model)
    save_adapter(model, tmp_path / "a")
    x = torch.randn(6, 64)
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    for parameter in fresh[0].adapters.parameters():
        nn.init.zeros_(parameter)
    load_adapter(fresh, tmp_path / "a")  # into a model that is adapted alike
    assert torch.equal(fresh(x), model(x))
    dense = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    load_adapter(dense, tmp_path / "a")
    assert torch.equal(dense[0].skew, model[0].adapters["default"].skew)
    nn.init.ones_(fresh[0].add_adapter("second").skew)
    save_adapter(fresh, tmp_path / "b", adapter="second")
    assert (load_file(tmp_path / "b")["0.skew"] == 1).all()
    save_adapter(fresh, tmp_path / "c")
    assert torch.equal(load_file(tmp_path / "c")["0.skew"], load_file(tmp_path / "a")["0.skew"])
    with pytest.raises(ValueError, match="without BOFT layers"):
        save_adapter(fresh, tmp_path / "d", adapter="third")


def test_a_trained_bias_has_one_name_over_dense_and_quantized_layers(tmp_path):
    dense = nn.Sequential(nn.Linear(64, 32))
    packed = nn.Sequential(PackedLinear(copy.deepcopy(dense[0])))
    for model, name in ((dense, "0.bias"), (packed, "0.base.bias")):
        ours = adapt(copy.deepcopy(model), ["0"])
        bias = ours.get_parameter(name)
        with torch.no_grad():
            bias.copy_(torch.randn(32))
        bias.requires_grad_(True)
        save_adapter(ours, tmp_path / "a")
        assert set(load_file(tmp_path / "a")) == {"0.skew", "0.scale_offset", "0.bias"}
        for other, where in ((dense, "0.bias"), (packed, "0.base.bias")):
            fresh = load_adapter(copy.deepcopy(other), tmp_path / "a")
            assert torch.equal(fresh.get_parameter(where), bias)
            assert fresh.get_parameter(where).requires_grad
            load_adapter(fresh, tmp_path / "a")  # adapted alike


def test_failing_leaves_them_trainable_as_they_were(tmp_path):
    model = nn.Sequential(PackedLinear(nn.Linear(64, 64)), nn.Linear(15, 3))
    with pytest.raises(ValueError, match="Nearest valid"):
        adapt(model, ["0", "1"], block_size=8)
    assert model[0].bias.requires_grad
    save_adapter(adapt(nn.Sequential(nn.Linear(64, 32)), ["0"]), tmp_path / "a")  # other outputs
    with pytest.raises(ValueError, match="expected a floating-point tensor of shape"):
        load_adapter(model, tmp_path / "a")
    assert model[0].bias.requires_grad
    assert type(model[0]) is PackedLinear


def test_what_adapt_refuses_over_them():
    def model():
        return nn.Sequential(PackedLinear(nn.Linear(64, 32)))

    adapt(model(), ["0"], kaleidoscope=0)
    with pytest.raises(ValueError, match="0: kaleidoscope: expected 0 over a base"):
        adapt(model(), ["0"], kaleidoscope=1)

    with pytest.raises(ValueError, match="0: side: expected 'in'"):
        adapt(model(), ["0"], side="out")
    with pytest.raises(ValueError, match="Nearest valid"):
        adapt(model(), ["0"], block_size=7)
    done = adapt(model(), ["0"])
    with pytest.raises(ValueError, match="'0' is adapted already"):
        adapt(done, ["0"])


def test_bfloat16_activations(quantized):
    model, _ = quantized
    if type(model[0]).__name__ == "Linear" or isinstance(model[0], PackedLinear):
        model = model.bfloat16() if isinstance(model[0], PackedLinear) else model
    trained(model, block_size=8)
    x = torch.randn(6, 64)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all()
