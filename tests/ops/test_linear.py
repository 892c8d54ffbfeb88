"""boft_linear: both sides, scale, bias, dropout, precision, what it saves."""

import pytest
import reference
import torch
import torch.nn.functional as F
from linear_operands import D_IN, D_OUT, call, operands

from boft_ops import boft_linear, cayley
from boft_ops._runtime import backend as backends


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("without", [(), ("scale",), ("bias",), ("scale", "bias")])
@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("side", ["in", "out"])
def test_forward_and_every_gradient(backend, side, m, without, frozen):
    """Frozen weights, the usual case, have a Function of their own."""
    everything = operands(side, m)
    tensors = {k: v.requires_grad_() for k, v in everything.items() if k not in without}
    y = call(boft_linear, tensors, side=side)
    if frozen:
        weight = tensors.pop("weight").detach()
        y = call(boft_linear, tensors | {"weight": weight}, side=side)
        tensors["weight"] = weight
    expected = call(reference.linear, tensors, side=side)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    tensors = {k: v for k, v in tensors.items() if v.requires_grad}
    got = torch.autograd.grad(y, tensors.values(), upstream)
    want = torch.autograd.grad(expected, tensors.values(), upstream)
    for name, g, w in zip(tensors, got, want, strict=True):
        torch.testing.assert_close(g, w, msg=name)


@pytest.mark.parametrize("trained", ["all", "all but weight", "x", "skew", "scale", "bias"])
@pytest.mark.parametrize("method", ["exact", "neumann5"])
@pytest.mark.parametrize("side", ["in", "out"])
def test_gradcheck(side, method, trained):
    tensors = operands(side)
    for name, tensor in tensors.items():
        tensor.requires_grad_(
            trained in ("all", name) or (trained == "all but weight" and name != "weight")
        )

    def function(*args):
        return boft_linear(*args, side=side, method=method)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("dropout", [None, (1.0, 0.5)])
@pytest.mark.parametrize("trained_scale", [True, False])
@pytest.mark.parametrize(("m", "b", "d"), [(2, 8, 768), (1, 6, 96), (8, 4, 512), (5, 4, 192)])
def test_one_fused_product_in_float32(m, b, d, trained_scale, dropout):
    """Enough rows for the kernel that does all in one: as exact as torch's own operators."""
    rows, n = 131, 205
    x, weight, bias = torch.randn(rows, d), torch.randn(n, d) / d**0.5, torch.randn(n)
    skew, scale = 0.3 * torch.randn(m, d // b, b * (b - 1) // 2), 1 + 0.2 * torch.randn(n)
    upstream, results = torch.randn(rows, n), []
    for backend, dtype in ((None, torch.float32), ("reference", torch.float32),
                           ("reference", torch.float64)):  # fmt: skip
        arguments = [t.to(dtype).requires_grad_() for t in (x, skew, scale, bias)]
        arguments[2].requires_grad_(trained_scale)
        torch.manual_seed(3)  # the generator of the mask
        with backends.force(backend):
            y = boft_linear(arguments[0], weight.to(dtype), *arguments[1:], dropout=dropout)
            wanted = [a for a in arguments if a.requires_grad]
            results.append([y, *torch.autograd.grad(y, wanted, upstream.to(dtype))])
    for ours, theirs, exact in zip(*results, strict=True):
        bound = 2 * (theirs - exact).norm() + 1e-7 * exact.norm()
        assert (ours - exact).norm() <= bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["in", "out"])
def test_identity_bit_for_bit(side, dtype):
    tensors = operands(side, dtype=dtype, std=0.0)
    tensors["scale"] = torch.ones(D_OUT, dtype=dtype)
    for without in ((), ("scale",), ("bias",), ("scale", "bias")):
        some = {k: v for k, v in tensors.items() if k not in without}
        expected = F.linear(some["x"], some["weight"], some.get("bias"))
        assert torch.equal(call(boft_linear, some, side=side), expected)


@pytest.mark.parametrize("side", ["in", "out"])
def test_float32_error(side):
    """At most twice the error of the same computation through solve and dense matrices."""
    tensors = operands(side, dtype=torch.float32)
    exact = call(reference.linear, {k: v.double() for k, v in tensors.items()}, side=side)
    dense = call(reference.linear, tensors, side=side)
    y = call(boft_linear, tensors, side=side)
    assert (y - exact).norm() <= 2 * (dense - exact).norm() + 1e-7


@pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("side", ["in", "out"])
def test_a_large_bias_does_not_swamp_the_gradient_of_the_scale(side, size):
    tensors = operands(side, dtype=torch.float32)
    tensors["x"] = torch.randn(4000, D_IN)
    tensors["bias"] = size * tensors["bias"]
    wide = {k: v.double() for k, v in tensors.items()}
    upstream = torch.randn(4000, D_OUT)
    tensors["scale"].requires_grad_(), wide["scale"].requires_grad_()
    (got,) = torch.autograd.grad(call(boft_linear, tensors, side=side), tensors["scale"], upstream)
    exact = call(reference.linear, wide, side=side)
    (want,) = torch.autograd.grad(exact, wide["scale"], upstream.double())
    # the output itself is rounded to its own size, at least that of the bias
    assert (got - want).norm() / want.norm() < 1e-6 * (1 + size)


def test_small_changes_of_the_scale_survive_half_precision():
    tensors = operands(dtype=torch.bfloat16, std=0.0)
    tensors["scale"] = torch.full((D_OUT,), 1.003)  # in bfloat16 this would be 1
    plain = F.linear(tensors["x"], tensors["weight"]).double()
    y = call(boft_linear, {k: v for k, v in tensors.items() if k != "bias"})
    mean = ((y.double() - plain) * plain.sign()).sum() / plain.abs().sum()
    assert 0.001 < mean < 0.005


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["in", "out"])
def test_half_precision_error(side, dtype):
    tensors = operands(side, dtype=dtype)
    tensors["skew"] = tensors["skew"].float()
    exact = call(reference.linear, {k: v.double() for k, v in tensors.items()}, side=side)
    x, weight = tensors["x"], tensors["weight"]
    r = reference.rotation(reference.cayley(tensors["skew"].double())).to(dtype)
    dense = F.linear(x @ r, weight) if side == "in" else F.linear(x, weight) @ r.T
    dense = dense * tensors["scale"] + tensors["bias"]
    y = call(boft_linear, tensors, side=side)
    assert y.dtype == dtype
    assert (y.double() - exact).norm() <= 2 * (dense.double() - exact).norm()


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("trained_scale", [False, True])
def test_saved_for_backward(side, trained_scale):
    """x and O(m d b); the output before scaling too, if the scale is trained; never more."""
    n, d = 2000, 64
    x = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(d, d)
    skew = torch.randn(2, 8, 28).requires_grad_()
    scale = torch.ones(d, requires_grad=trained_scale)
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = boft_linear(x, weight, skew, scale, torch.randn(d), side=side)
    rows = 4 * n * d
    small = 4 * 2 * d * 8
    assert sum(saved.values()) <= rows * (1 + trained_scale) + 8 * small
    y.sum().backward()
    assert skew.grad is not None


def test_dropout_is_one_mask_for_forward_and_backward(backend):
    tensors = operands(m=3, dtype=torch.float64)
    tensors["skew"].requires_grad_()
    torch.manual_seed(5)
    y = call(boft_linear, tensors, dropout=(0.7, 0.5))
    y.sum().backward()
    dropped = (tensors["skew"].grad == 0).all(-1)
    assert dropped.sum(1).sort().values.tolist() == [0, 4, 4]  # floor(2.1) factors, 4 of 8 blocks
    kept = tensors["skew"].detach() * ~dropped[..., None]
    torch.testing.assert_close(y, call(boft_linear, tensors | {"skew": kept}))
    generator = torch.Generator().manual_seed(5)
    again = call(boft_linear, tensors, dropout=(0.7, 0.5), generator=generator)
    torch.testing.assert_close(again, y)


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)])
def test_leading_dimensions(leading):
    tensors = operands()
    x = torch.randn(*leading, D_IN, dtype=torch.float64, requires_grad=True)
    y = call(boft_linear, tensors | {"x": x})
    assert y.shape == (*leading, D_OUT)
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("side", ["in", "out"])
def test_autocast_follows_linear(side):
    tensors = operands(side, dtype=torch.float32)
    tensors["skew"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(boft_linear, tensors, side=side)
        plain = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
        assert y.dtype == plain.dtype == torch.bfloat16
        y.float().sum().backward()  # autocast is on in backward, and must not touch the blocks
    assert tensors["skew"].grad.dtype == torch.float32
    exact = call(boft_linear, {k: v.detach().double() for k, v in tensors.items()}, side=side)
    assert (y - exact).norm() / exact.norm() < 1e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = {k: v.detach().double() for k, v in tensors.items()}
        assert call(boft_linear, wide, side=side).dtype == torch.float64  # as torch's linear


def test_skew_may_be_wider_than_the_weight():
    tensors = operands(dtype=torch.bfloat16)
    tensors["skew"] = tensors["skew"].float().requires_grad_()
    tensors["scale"] = tensors["scale"].float().requires_grad_()
    y = call(boft_linear, tensors)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert tensors["skew"].grad.dtype == tensors["scale"].grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"weight": torch.zeros(16, 20)},
            ValueError,
            "x: expected a last dimension of 20",
        ),
        ({"weight": torch.zeros(32)}, ValueError, "weight: expected shape"),
        ({"skew": torch.zeros(2, 8, 7)}, ValueError, "skew: expected a last dimension"),
        ({"skew": torch.zeros(8, 6)}, ValueError, r"skew: expected shape \(n_factors"),
        ({"skew": torch.zeros(2, 4, 6)}, ValueError, "skew: expected 32 features on side 'in'"),
        ({"skew": torch.zeros(5, 8, 6)}, ValueError, "n_factors: expected.*Nearest valid"),
        ({"scale": torch.zeros(24)}, ValueError, r"scale: expected shape \(16,\), got \(24,\)"),
        ({"bias": torch.zeros(1, 16)}, ValueError, "bias: expected shape"),
        ({"weight": torch.zeros(16, 32).half()}, TypeError, "weight: expected the dtype of x"),
        ({"bias": torch.zeros(16).double()}, TypeError, "bias: expected the dtype of x"),
        ({"x": torch.zeros(3, 32).int()}, TypeError, "x: expected a dtype"),
        (
            {"skew": torch.zeros(2, 8, 6, device="meta")},
            ValueError,
            "skew: expected the device of x",
        ),
        ({"scale": 2.0}, TypeError, "scale: expected a torch.Tensor, got float"),
    ],
)
def test_bad_tensors(change, error, match):
    with pytest.raises(error, match=match):
        call(boft_linear, operands(dtype=torch.float32) | change)


def test_bad_options():
    tensors = operands(dtype=torch.float32)
    with pytest.raises(ValueError, match="side: expected one of"):
        call(boft_linear, tensors, side="left")
    with pytest.raises(ValueError, match="method: expected one of"):
        call(boft_linear, tensors, method="cayley")
    with pytest.raises(ValueError, match="p_block: expected"):
        call(boft_linear, tensors, dropout=(0.5, 2.0))
    with pytest.raises(ValueError, match="dropout: expected"):
        call(boft_linear, tensors, dropout=0.5)


def test_blocks_of_the_function_are_orthogonal():
    """The layer multiplies by what cayley returns (singular values of W are kept)."""
    tensors = operands()
    tensors.pop("scale"), tensors.pop("bias")
    eye = torch.eye(D_IN, dtype=torch.float64)
    merged = call(boft_linear, tensors | {"x": eye}).T
    torch.testing.assert_close(
        torch.linalg.svdvals(merged), torch.linalg.svdvals(tensors["weight"])
    )
    r = reference.rotation(cayley(tensors["skew"]))
    torch.testing.assert_close(merged, tensors["weight"] @ r.T)
