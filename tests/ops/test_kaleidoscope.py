"""R_G = R_{l,1} R_{l,2}^T ... R_{1,1} R_{1,2}^T: the function, and the layers that have it."""

import copy
import json

import pytest
import reference
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import boft_ops
from boft_ops import BOFTConv2d, BOFTLinear, OFTLinear, cayley, kaleidoscope_matmul

# (l, (m1, b1), (m2, b2), d): one stage each; groups of two sizes; odd blocks; one level
SHAPES = [
    (3, (2, 8), (2, 8), 48),
    (2, (2, 4), (1, 8), 24),
    (2, (1, 3), (1, 9), 18),
    (1, (3, 4), (3, 4), 16),
]
SEVERAL_STAGES = (2, (8, 2), (7, 4), 256)


def random_blocks(levels, m, b, d, dtype=torch.float64):
    skew = 0.4 * torch.randn(levels, m, d // b, b * (b - 1) // 2, dtype=torch.float64)
    return cayley(skew).to(dtype)


def dense(first, second):
    product = torch.eye(first.shape[2] * first.shape[3], dtype=first.dtype)
    for one, two in zip(first, second):  # level 1 stands on the right
        product = reference.rotation(one) @ reference.rotation(two).T @ product
    return product


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("levels", "one", "two", "d"), SHAPES)
def test_forward_and_backward(backend, levels, one, two, d, transpose):
    check_forward_and_backward(levels, one, two, d, transpose)


@pytest.mark.parametrize("transpose", [False, True])
def test_several_stages(transpose):  # on this machine's own backend: Triton's interpreter is slow
    check_forward_and_backward(*SEVERAL_STAGES, transpose)


def check_forward_and_backward(levels, one, two, d, transpose):
    first = random_blocks(levels, *one, d).requires_grad_()
    second = random_blocks(levels, *two, d).requires_grad_()
    x = torch.randn(2, 3, d, dtype=torch.float64, requires_grad=True)
    r = dense(first, second)
    expected = x @ (r.T if transpose else r)
    y = kaleidoscope_matmul(x, first, second, transpose=transpose)
    torch.testing.assert_close(y, expected)
    upstream, inputs = torch.randn_like(y), (x, first, second)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for got, want in zip(torch.autograd.grad(y, inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("levels", "one", "two", "d"), [SHAPES[0], SHAPES[1], (2, (4, 4), (4, 4), 32)]
)
def test_gradcheck(levels, one, two, d):
    skews = [
        (0.3 * torch.randn(levels, m, d // b, b * (b - 1) // 2).double()).requires_grad_()
        for m, b in (one, two)
    ]
    x = torch.randn(2, d, dtype=torch.float64, requires_grad=True)

    def function(x, first, second):
        return kaleidoscope_matmul(x, cayley(first), cayley(second))

    assert torch.autograd.gradcheck(function, (x, *skews), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *skews), fast_mode=True)


def test_it_is_orthogonal_and_transpose_undoes_it():
    first, second = random_blocks(3, 2, 8, 32), random_blocks(3, 3, 4, 32)
    x = torch.randn(5, 32, dtype=torch.float64)
    y = kaleidoscope_matmul(x, first, second)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(kaleidoscope_matmul(y, first, second, transpose=True), x)


def test_equal_halves_cancel_exactly_enough():
    blocks = random_blocks(4, 2, 8, 32)
    x = torch.randn(3, 32, dtype=torch.float64)
    torch.testing.assert_close(kaleidoscope_matmul(x, blocks, blocks), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_one_dense_product(dtype):
    first, second = (random_blocks(3, 2, 8, 64, torch.float32) for _ in range(2))
    x = torch.randn(50, 64).to(dtype)
    exact = x.double() @ dense(first.double(), second.double())
    error = (kaleidoscope_matmul(x, first, second).double() - exact).abs().max()
    in_torch = x @ dense(first.double(), second.double()).to(dtype)
    assert error <= 2 * (in_torch.double() - exact).abs().max() + 1e-6


def test_one_pass_where_it_is_one_stage(monkeypatch):
    passes = []
    counted = boft_ops.ops.kaleidoscope.rotate
    monkeypatch.setattr(
        boft_ops.ops.kaleidoscope, "rotate", lambda *a: (passes.append(1), counted(*a))[1]
    )
    kaleidoscope_matmul(torch.randn(2, 64), *(random_blocks(5, 2, 8, 64) for _ in range(2)))
    assert len(passes) == 1


@pytest.mark.parametrize("levels", [1, 3])
def test_compiles_whole(levels):
    first, second = (random_blocks(levels, 2, 4, 16).float() for _ in range(2))
    x = torch.randn(4, 16, requires_grad=True)
    compiled = torch.compile(kaleidoscope_matmul, fullgraph=True, backend="aot_eager")
    y = compiled(x, first, second)
    torch.testing.assert_close(y, kaleidoscope_matmul(x, first, second))
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(grad, 2 * x)  # norms are kept


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        ((2, 8, 8), (3, 2, 4, 8, 8), r"first: expected shape \(levels"),
        ((3, 2, 4, 8, 8), (2, 2, 4, 8, 8), "second: expected 3 levels"),
        ((3, 2, 4, 8, 8), (3, 2, 8, 8, 8), "second: expected butterflies of 32 features"),
        ((3, 4, 4, 8, 8), (3, 2, 4, 8, 8), "n_factors: expected"),
        ((0, 2, 4, 8, 8), (0, 2, 4, 8, 8), r"first: expected shape \(levels"),
    ],
)
def test_bad_shapes(first, second, match):
    with pytest.raises(ValueError, match=match):
        kaleidoscope_matmul(torch.randn(2, 32), torch.zeros(first), torch.zeros(second))


def test_blocks_of_two_dtypes():
    x, blocks = torch.randn(3, 32), random_blocks(2, 2, 8, 32).float()
    want = kaleidoscope_matmul(x, blocks, blocks.flip(0))
    for first, second in ((blocks, blocks.double()), (blocks.double(), blocks)):
        got = kaleidoscope_matmul(x, first, second.flip(0))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_bad_types():
    blocks = random_blocks(1, 2, 8, 32)
    with pytest.raises(ValueError, match="second: blocks: expected shape"):
        kaleidoscope_matmul(torch.randn(2, 32), blocks, torch.zeros(1, 2, 4, 8, 7))
    with pytest.raises(TypeError, match="first: expected a dense tensor, got one of"):
        kaleidoscope_matmul(torch.randn(2, 32), torch.zeros(1, 2, 4, 8, 8).to_sparse(), blocks)
    with pytest.raises(TypeError, match="second: expected a dtype"):
        kaleidoscope_matmul(torch.randn(2, 32), blocks, blocks.long())


# --- The layers -----------------------------------------------------------------------------------

OPTIONS = {"block_size": 4, "n_factors": 2, "kaleidoscope": 3}


def trained(layer):
    for p in layer.parameters():
        if p.requires_grad:
            p.data = p.data + 0.3 * torch.randn_like(p)
    return layer


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("scale", [False, True])
def test_layer_is_the_formula(side, scale):
    layer = trained(BOFTLinear(16, 24, side=side, scale=scale, dtype=torch.float64, **OPTIONS))
    x = torch.randn(3, 16, dtype=torch.float64)
    blocks = torch.stack([reference.cayley(q) for q in layer.skew.detach()])
    levels = blocks.unflatten(0, (3, 2, 2))
    r = dense(levels[:, 0], levels[:, 1])
    weight = layer.frozen_weight @ r.T if side == "in" else r @ layer.frozen_weight
    if scale:
        weight = layer.scale.detach()[:, None] * weight
    torch.testing.assert_close(layer.rotation(), r)
    torch.testing.assert_close(layer.merged_weight(), weight)
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias)


@pytest.mark.parametrize("side", ["in", "out"])
def test_layer_compiles_whole(side):
    layer = trained(BOFTLinear(16, 24, side=side, **OPTIONS))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 16)
    torch.testing.assert_close(compiled(x), layer(x))
    parameters = (layer.skew, layer.scale_offset)
    wanted = torch.autograd.grad(layer(x).square().sum(), parameters)
    for got, want in zip(torch.autograd.grad(compiled(x).square().sum(), parameters), wanted):
        torch.testing.assert_close(got, want)


def test_layer_starts_as_the_frozen_one_and_counts_its_parameters():
    linear = torch.nn.Linear(16, 24)
    layer = BOFTLinear.from_linear(linear, **OPTIONS)
    x = torch.randn(5, 16)
    assert torch.equal(layer(x), linear(x))
    assert layer.n_effective_parameters == 3 * 2 * (2 * 16 * 3 // 2) + 24
    assert "kaleidoscope=3" in repr(layer)


@pytest.mark.parametrize("method", ["exact", "neumann5"])
@pytest.mark.parametrize("side", ["in", "out"])
def test_merge_and_unmerge(side, method):
    layer = trained(BOFTLinear(16, 24, side=side, method=method, dtype=torch.float64, **OPTIONS))
    x, before = torch.randn(3, 16, dtype=torch.float64), layer.frozen_weight.clone()
    y = layer(x)
    torch.testing.assert_close(layer.eval().merge(keep=False)(x), y)
    torch.testing.assert_close(layer.merged_layer()(x), y)
    torch.testing.assert_close(layer.unmerge().frozen_weight, before)


def test_convolution_and_dropout():
    layer = trained(BOFTConv2d(4, 8, 2, p_component=0.5, p_block=0.5, **OPTIONS))
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer.eval()(x), layer.merged_layer()(x))
    assert not torch.allclose(layer.train()(x), layer.eval()(x))


def test_training_finds_what_a_butterfly_cannot():
    """A rotation of four features by a quarter turn in two planes that two 2 x 2 factors miss."""
    torch.manual_seed(1)
    target = cayley(torch.randn(1, 6))[0]
    x = torch.randn(64, 4)
    losses = {}
    for levels in (0, 3):
        layer = BOFTLinear(
            4, 4, bias=False, block_size=2, n_factors=2, scale=False, kaleidoscope=levels
        )
        layer.frozen_weight.data = torch.eye(4)
        optimizer = torch.optim.Adam([layer.skew], lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (layer(x) - x @ target).square().mean()
            loss.backward()
            optimizer.step()
        losses[levels] = loss.item()
    assert losses[3] < 1e-6 < 1e-2 < losses[0]


def test_adapter_file(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 8))
    base = copy.deepcopy(model)
    trained(boft_ops.adapt(model, ["0", "1"], **OPTIONS))
    boft_ops.save_adapter(model, tmp_path / "a.safetensors")
    x = torch.randn(3, 16)
    again = boft_ops.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")
    assert torch.equal(again(x), model(x))
    assert again[0].kaleidoscope == 3
    plain = boft_ops.adapt(copy.deepcopy(base), ["0", "1"], block_size=4, n_factors=2)
    with pytest.raises(ValueError, match="expected the model's"):
        boft_ops.load_adapter(plain, tmp_path / "a.safetensors")
    # a plain layer's file says nothing of it, as files written before there was the option
    boft_ops.save_adapter(plain, tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        options = json.loads(file.metadata()["layers"])["0"]
    assert "kaleidoscope" not in options
    with pytest.raises(ValueError, match="expected the model's"):
        boft_ops.load_adapter(again, tmp_path / "b.safetensors")


def test_adapter_file_with_an_option_that_no_layer_has(tmp_path):
    model = boft_ops.adapt(torch.nn.Sequential(torch.nn.Linear(16, 16)), ["0"], **OPTIONS)
    boft_ops.save_adapter(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    metadata["layers"] = metadata["layers"].replace("kaleidoscope", "telescope")
    tensors = load_file(tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors", metadata)
    with pytest.raises(ValueError, match="telescope"):
        boft_ops.load_adapter(model, tmp_path / "b.safetensors")


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="kaleidoscope: expected 0 with n_factors=1"):
        OFTLinear(16, 16, block_size=4, kaleidoscope=2)
    with pytest.raises(ValueError, match="kaleidoscope: expected 0"):
        BOFTLinear(16, 16, block_size=4, kaleidoscope=-1)
    with pytest.raises(TypeError, match="kaleidoscope: expected an int"):
        BOFTLinear(16, 16, block_size=4, kaleidoscope=True)
    with pytest.raises(RuntimeError, match="expected a butterfly, got a kaleidoscope"):
        BOFTLinear(16, 16, **OPTIONS).interpolate(1)
