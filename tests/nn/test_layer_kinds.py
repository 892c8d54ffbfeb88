"""Layers other than nn.Linear and nn.Conv2d: replaced, called, or refused by name."""

import copy

import accelerate
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import boft_ops
from boft_ops import (
    BOFTConv1d,
    BOFTConv3d,
    BOFTEmbedding,
    BOFTLinear,
    MultiAdapterLinear,
    adapt,
    butterfly_matmul,
    cayley,
)
from boft_ops.interop.convert import convert

OPTIONS = {"block_size": 4, "n_factors": 2}


def randomized(model):
    for name, parameter in model.named_parameters():
        if name.endswith("skew"):
            nn.init.normal_(parameter, std=0.2)
        if name.endswith("scale_offset"):
            nn.init.uniform_(parameter, -0.5, 1)
    return model


def check_life(make, x, tmp_path, **options):
    """Adapt a model, train, save, load, merge and unload it; return the randomized model."""
    model = make().eval()
    before = model(x)
    adapt(model, "0", **OPTIONS, **options)
    assert torch.equal(model(x), before)
    model.train()(x).square().sum().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in trained} <= {"skew", "scale_offset"}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    randomized(model.eval())
    y = model(x)
    assert not torch.allclose(y, before)
    boft_ops.save_adapter(model, tmp_path / "a.safetensors")
    fresh = make()
    if options:
        adapt(fresh, "0", **OPTIONS, **options)
    assert torch.equal(boft_ops.load_adapter(fresh, tmp_path / "a.safetensors").eval()(x), y)
    assert torch.equal(boft_ops.unload(copy.deepcopy(model))(x), before)
    return model, y


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("side", ["in", "out"])
def test_convolutions_of_other_dimensions(dim, side, tmp_path):
    torch.manual_seed(0)
    kind, form = {1: (nn.Conv1d, BOFTConv1d), 3: (nn.Conv3d, BOFTConv3d)}[dim]
    base = nn.Sequential(kind(8, 16, 2, stride=2, padding=1, groups=2))
    x = torch.randn(2, 8, *[5] * dim)
    model, y = check_life(lambda: copy.deepcopy(base), x, tmp_path, side=side)
    assert type(model[0]) is form
    # the kernel as a matrix, rotated by the blocks
    matrix, blocks = base[0].weight.flatten(1), cayley(model[0].skew)
    if side == "in":
        rotated = butterfly_matmul(matrix, blocks, transpose=True)
    else:
        rotated = butterfly_matmul(matrix.mT, blocks, transpose=True).mT
    plain = copy.deepcopy(base)
    plain[0].weight.data = (rotated * model[0].scale[:, None]).reshape(base[0].weight.shape).data
    torch.testing.assert_close(y, plain(x), atol=1e-5, rtol=1e-5)
    merged = boft_ops.merge(model)
    assert type(merged[0]) is kind
    torch.testing.assert_close(merged(x), y, atol=1e-5, rtol=1e-5)


def test_embeddings(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(10, 16, padding_idx=3), nn.Linear(16, 4))
    ids = torch.tensor([[1, 2, 3], [9, 0, 1]])
    model, y = check_life(lambda: copy.deepcopy(base), ids, tmp_path)
    layer = model[0]
    assert type(layer) is BOFTEmbedding
    assert layer.scale is None
    expected = butterfly_matmul(base[0](ids), cayley(layer.skew), transpose=True)
    torch.testing.assert_close(layer(ids), expected)
    torch.testing.assert_close(nn.functional.embedding(ids, layer.weight), expected)
    # one-hot rows through the linear layer with the transposed table, its outputs rotated
    linear = BOFTLinear(10, 16, bias=False, side="out", scale=False, **OPTIONS)
    linear.frozen_weight = nn.Parameter(base[0].weight.detach().mT, requires_grad=False)
    linear.skew = layer.skew
    one_hot = nn.functional.one_hot(ids, 10).float()
    torch.testing.assert_close(layer(ids), linear(one_hot))
    assert torch.equal(layer(torch.tensor(3)), torch.zeros(16))
    layer.merge()
    torch.testing.assert_close(layer(ids), expected)
    layer.unmerge()
    boft_ops.set_strength(model, 0)
    assert torch.equal(layer(ids), base[0](ids))
    boft_ops.set_strength(model, 1)
    merged = boft_ops.merge(model)
    assert type(merged[0]) is nn.Embedding
    assert merged[0].padding_idx == 3
    torch.testing.assert_close(merged(ids), y)


def test_embeddings_in_all_their_options():
    layer = BOFTEmbedding(10, 16, kaleidoscope=1, p_component=1.0, p_block=0.5, **OPTIONS)
    ids = torch.arange(10)
    randomized(layer)
    torch.manual_seed(1)
    assert not torch.equal(layer(ids), layer(ids))  # dropout
    layer.eval()
    torch.testing.assert_close(layer(ids), layer.merged_weight())
    layer.reset_parameters()
    assert torch.equal(layer(ids), layer.frozen_weight)
    with pytest.raises(ValueError, match="side: expected 'out' of an embedding, got 'in'"):
        BOFTEmbedding(10, 16, side="in")
    with pytest.raises(ValueError, match="0: scale: expected False of an embedding, got True"):
        adapt(nn.Sequential(nn.Embedding(10, 16)), "0", scale=True)
    with pytest.raises(ValueError, match="embedding: expected max_norm=None"):
        BOFTEmbedding.from_embedding(nn.Embedding(10, 16, max_norm=1.0))
    with pytest.raises(TypeError, match=r"embedding: expected an nn\.Embedding, got Linear"):
        BOFTEmbedding.from_embedding(nn.Linear(10, 16))


def gpt2():
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def test_gpt2(tmp_path):
    """Its linear layers are Conv1D, with transposed weights."""
    ids = torch.tensor([[1, 5, 7, 2]])
    model = adapt(gpt2(), "all-linear", **OPTIONS)
    assert sum(isinstance(m, MultiAdapterLinear) for m in model.modules()) == 8
    assert torch.equal(model(ids).logits, gpt2()(ids).logits)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    randomized(model.eval())
    logits = model(ids).logits
    boft_ops.save_adapter(model, tmp_path / "a.safetensors")
    loaded = boft_ops.load_adapter(gpt2(), tmp_path / "a.safetensors").eval()
    assert torch.equal(loaded(ids).logits, logits)
    with pytest.raises(ValueError, match=r"c_attn: expected the outputs of a Linear or Conv2d"):
        convert(tmp_path / "a.safetensors", tmp_path / "peft", "peft")  # weights are transposed
    merged = boft_ops.merge(model)
    assert isinstance(merged.transformer.h[0].attn.c_attn, Conv1D)
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-5, rtol=1e-5)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x) - self.bias


class Foreign(nn.Module):
    """A linear layer of another library."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 16, 8
        self.matrix = nn.Parameter(torch.randn(16, 8))

    def forward(self, x):
        return x @ self.matrix


def hooked():
    linear = nn.Linear(16, 8)
    linear.register_forward_hook(lambda module, args, output: 3 * output)
    return linear


FOREIGN = {
    "own forward": (lambda: Doubled(16, 8), TypeError, r"Doubled with its own forward\(\)"),
    "another library's": (Foreign, TypeError, "'0' is Foreign; wrap=True calls it"),
    "hooks": (hooked, ValueError, "without hooks"),
    "parametrized": (
        lambda: parametrizations.spectral_norm(nn.Linear(16, 8)).eval(),
        ValueError,
        r"parametrizations.*wrap=True would keep",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_wrapping(kind, tmp_path):
    make, error, message = FOREIGN[kind]
    torch.manual_seed(0)
    base, x = nn.Sequential(make()), torch.randn(3, 16)
    with pytest.raises(error, match=message):
        adapt(copy.deepcopy(base), "0", **OPTIONS)
    options = {"wrap": True} | ({"scale": False} if kind in ("hooks", "own forward") else {})
    model, y = check_life(lambda: copy.deepcopy(base), x, tmp_path, **options)
    assert isinstance(model[0], MultiAdapterLinear)
    rotated = butterfly_matmul(x, cayley(model[0].adapters["default"].skew))
    expected = base.eval()(rotated)
    if "scale" not in options:
        bias = getattr(base[0], "bias", None)
        bias = 0 if bias is None else bias
        expected = model[0].adapters["default"].scale * (expected - bias) + bias
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_wrapping_replaces_what_it_can():
    model = adapt(nn.Sequential(nn.Linear(16, 16), Doubled(16, 8)), ["0", "1"], wrap=True)
    assert type(model[0]) is BOFTLinear
    assert isinstance(model[1], MultiAdapterLinear)


def test_wrapping_an_offloaded_layer():
    """The adapter lies where the layer is computed, not on the meta device where it rests."""
    model = nn.Sequential(nn.Linear(16, 8))
    x = torch.randn(2, 16)
    y = model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    adapt(model, "0", wrap=True, **OPTIONS)
    assert model[0].adapters["default"].skew.device.type == "cpu"
    torch.testing.assert_close(model(x), y)
    model(x).sum().backward()
    assert model[0].adapters["default"].skew.grad is not None


def fp8_linear(block_size):
    """transformers' fine-grained fp8, with a forward in plain torch, as its kernels need a GPU."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    torch.manual_seed(0)
    layer = FP8Linear(32, 12, block_size=block_size, has_bias=True)
    layer.weight.data = torch.randn(12, 32).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.rand(layer.weight_scale_inv.shape) + 0.5
    layer.bias.data.normal_()
    return layer.requires_grad_(False)


@pytest.mark.parametrize("block_size", [None, (8, 16), (5, 12)])
def test_fine_grained_fp8(block_size, monkeypatch):
    layer = fp8_linear(block_size)
    dense = layer.weight.float()
    for i in range(12):
        for j in range(32):
            scales = layer.weight_scale_inv
            scale = scales if block_size is None else scales[i // block_size[0], j // block_size[1]]
            dense[i, j] *= scale

    def forward(self, x):
        return nn.functional.linear(x, dense, self.bias)

    monkeypatch.setattr(type(layer), "forward", forward)
    model, x = nn.Sequential(layer), torch.randn(4, 32)
    y = model(x)
    adapt(model, "all-linear", **OPTIONS)  # without wrap
    assert isinstance(model[0], MultiAdapterLinear)
    assert torch.equal(model(x), y)
    randomized(model.eval())
    merged = boft_ops.merge(copy.deepcopy(model), requantize=lambda linear: linear)
    torch.testing.assert_close(merged(x), model(x), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="requantize: expected a function over FP8Linear"):
        boft_ops.merge(model)


class Packed(nn.Module):
    """Packed integers under the attributes of HQQ or AutoGPTQ, with a transposed weight."""

    def __init__(self, sizes, packed):
        super().__init__()
        for name, size in zip(sizes, (16, 8)):
            setattr(self, name, size)
        integers = torch.randint(-8, 8, (16, 8), dtype=torch.int8)
        self.register_parameter(packed, nn.Parameter(integers, requires_grad=False))
        self.packed, self.bias = packed, None

    def forward(self, x):
        return x @ getattr(self, self.packed).to(x.dtype)


@pytest.mark.parametrize(
    ("sizes", "packed"),
    [(("in_features", "out_features"), "W_q"), (("infeatures", "outfeatures"), "qweight")],
    ids=["HQQ", "AutoGPTQ"],
)
def test_packed_integers(sizes, packed, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(Packed(sizes, packed))
    model, _ = check_life(lambda: copy.deepcopy(base), torch.randn(3, 16), tmp_path)
    assert isinstance(model[0], MultiAdapterLinear)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose1d(8, 8, 2),
        nn.ConvTranspose2d(8, 8, 2),
        nn.ConvTranspose3d(8, 8, 2),
        nn.EmbeddingBag(8, 8),
        nn.Bilinear(8, 8, 8),
        nn.LayerNorm(8),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("wrap", [False, True])
def test_what_is_refused_by_name(layer, wrap):
    with pytest.raises(TypeError, match=f"'0' is {type(layer).__name__}$"):
        adapt(nn.Sequential(layer), "0", wrap=wrap)


def test_float8_training():
    """torchao's conversion cannot drop an adapter; in the other order both work."""
    float8 = pytest.importorskip("torchao.float8")
    config = float8.Float8LinearConfig(emulate=True)
    base, x = nn.Sequential(nn.Linear(32, 16)), torch.randn(16, 32)
    adapted = randomized(adapt(copy.deepcopy(base), "0", **OPTIONS))
    y = adapted(x)
    with pytest.raises(TypeError, match=r"cannot assign .* as parameter 'weight'"):
        float8.convert_to_float8_training(adapted, config=config)
    assert torch.equal(adapted(x), y)
    float8.convert_to_float8_training(base, config=config)
    model = adapt(base, "0", wrap=True, **OPTIONS)
    model(x).sum().backward()
    assert isinstance(model[0].base, float8.float8_linear.Float8Linear)
    assert model[0].adapters["default"].skew.grad.abs().max() > 0
