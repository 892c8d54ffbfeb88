"""The layer as one native call: results, what it keeps, and what may happen to its output."""

import time

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from boft_ops import BOFTLinear, boft_linear
from boft_ops._runtime import backend, native, tuned
from boft_ops.ops import linear, product_choice
from boft_ops.ops.linear_from_skew import LEAST_SCALE
from boft_ops.ops.product_choice import Fused

pytestmark = pytest.mark.skipif(not native.kernels("cpu"), reason="the native library is not built")


@pytest.fixture(autouse=True)
def nothing_decided():
    tuned.forget()


def operands(rows=70, d=64, n=24, m=2, b=8, **more):
    torch.manual_seed(0)
    skew = 0.3 * torch.randn(m, d // b, b * (b - 1) // 2)
    tensors = {
        "x": torch.randn(rows, d, requires_grad=True),
        "weight": torch.randn(n, d),
        "skew": skew.requires_grad_(),
        "scale": (1 + 0.3 * torch.randn(n)).requires_grad_(),
        "bias": torch.randn(n),
    }
    return tensors | more


def step(tensors, change=lambda y: y, **options):
    """The output, and the gradients of the tensors that require one."""
    y = boft_linear(**tensors, **options)
    loss = (change(y) * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
    leaves = [t for t in tensors.values() if t is not None and t.requires_grad]
    return y, *torch.autograd.grad(loss, leaves)


def check(tensors, change=lambda y: y):
    """Compare with the reference, which is another path altogether."""
    ours = step(tensors, change)
    assert natively_served()
    with backend.force("reference"):
        wanted = step(tensors, change)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)


def natively_served():
    return any(plan.native is not None for plan in linear._plans.values())


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"bias": None},
        {"scale": None},
        {"scale": torch.rand(24)},
        {"bias": torch.randn(24, requires_grad=True)},
        {"bias": torch.randn(24, requires_grad=True), "scale": None},
        {"skew": torch.randn(2, 8, 28)},
        {"x": torch.randn(70, 64)},
        {"x": torch.randn(2, 3, 5, 64, requires_grad=True)},
        {"x": torch.randn(64, 70).t().requires_grad_()},
        {"x": torch.randn(0, 64, requires_grad=True)},
        {"x": torch.randn(64, requires_grad=True)},
        {"skew": (0.3 * torch.randn(1, 4, 120)).requires_grad_()},
    ],
    ids=["all", "no bias", "no scale", "frozen scale", "trained bias", "bias alone", "frozen skew",
         "frozen x", "dims", "strided", "no rows", "vector", "one factor"],
)  # fmt: skip
@pytest.mark.parametrize("rows", [5, 70])  # 70 are enough for the fused product
def test_results(rows, more):
    tensors = operands(rows=rows) | more
    if "x" in more and rows == 70 and more["x"].dim() == 2 and len(more["x"]) == 70:
        tensors["x"] = more["x"]
    check(tensors)


@pytest.mark.parametrize("chosen", [Fused(True, False), Fused(False, True), Fused(False, False)])
@pytest.mark.parametrize("scale", [True, False])
def test_results_by_the_product_that_the_machine_is_faster_with(monkeypatch, chosen, scale):
    monkeypatch.setattr(linear, "faster_products", lambda: chosen)
    tensors = operands(bias=torch.randn(24, requires_grad=True))
    check(tensors if scale else tensors | {"scale": None})
    (plan,) = (plan for plan in linear._plans.values() if plan.native)
    assert (plan.native.fused, plan.native.fused_backward) == chosen
    more = operands(d=128, m=5)  # several stages, which have one way for both directions
    with backend.force("reference"):
        wanted = step(more)
    torch.testing.assert_close(step(more), wanted, rtol=1e-5, atol=1e-4)
    assert any(
        plan.strategy == ("fused" if chosen.backward else "separate")
        for plan in linear._plans.values()
        if len(plan.stages) > 1
    )


def test_the_product_is_chosen_by_the_clock_unless_torch_is_to_be_deterministic(monkeypatch):
    measured = []
    monkeypatch.setattr(product_choice, "is_fused_faster", lambda call: measured.append(call))
    product_choice._measured.cache_clear()
    assert product_choice.faster_products() == Fused(True, True)  # tests are deterministic
    assert not measured
    torch.use_deterministic_algorithms(False)
    state = torch.get_rng_state()
    assert product_choice.faster_products() == Fused(None, None)
    assert torch.equal(torch.get_rng_state(), state)
    for call in measured:  # both ways compute the same
        torch.testing.assert_close(call(True), call(False), rtol=1e-3, atol=1e-2)
    product_choice._measured.cache_clear()


@pytest.mark.parametrize("default", [torch.set_default_device, torch.set_default_dtype])
def test_the_measurement_does_not_depend_on_defaults(default):
    torch.use_deterministic_algorithms(False)
    product_choice._measured.cache_clear()
    default({torch.set_default_device: "meta"}.get(default, torch.float64))
    try:
        assert set(product_choice.faster_products()) <= {True, False}
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        product_choice._measured.cache_clear()


def test_nothing_is_measured_where_somebody_watches(monkeypatch):
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(product_choice, "_measured", lambda: pytest.fail("measured"))
    with FlopCounterMode(display=False):
        step(operands())


@pytest.mark.parametrize("slow", [True, False])
def test_the_faster_way_is_found(slow):
    assert product_choice.is_fused_faster(lambda fused: time.sleep(0.01 * (fused == slow))) != slow


def test_dropout_is_the_same_forward_and_backward():
    torch.manual_seed(1)
    ours = step(operands(), dropout=(1.0, 0.5))
    torch.manual_seed(0)
    with backend.force("reference"):
        # the mask comes from the generator, which operands() seeds
        wanted = step(operands(), dropout=(1.0, 0.5))
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)


def test_a_decision_does_not_depend_on_the_number_of_rows():
    for rows in (1, 2, 17, linear.MIN_ROWS - 1):
        step(operands(rows=rows))
    assert len(linear._plans) == 1
    for rows in (linear.MIN_ROWS, 100, 191):
        step(operands(rows=rows))
    assert len(linear._plans) == 2


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("least", [0.0, LEAST_SCALE / 2, 1e-20])
def test_the_gradient_of_a_small_scale(rows, least):
    """The output tells nothing of what was multiplied by 0, and little where a bias drowns it."""
    tensors = operands(rows=rows)
    with torch.no_grad():
        tensors["scale"][3:6] = least
    check(tensors)


@pytest.mark.parametrize("rows", [5, 70])
def test_the_gradient_beside_a_large_bias(rows):
    tensors = operands(rows=rows, bias=100 * torch.randn(24))
    ours = step(tensors)
    exact = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in tensors.items()}
    wanted = step(exact)
    for got, want in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-3)


def kept(y):
    return y.grad_fn.output


@pytest.mark.parametrize("rows", [5, 70])
def test_the_output_may_be_changed_in_place(rows):
    tensors = operands(rows=rows)
    assert kept(boft_linear(**tensors)) is not None
    check(tensors, change=lambda y: y.relu_())
    # the next call knows, and saves the output before the scale
    assert kept(boft_linear(**tensors)) is None
    check(tensors, change=lambda y: y.relu_())


def test_a_view_of_the_output_may_be_changed_in_place():
    check(operands(), change=lambda y: (y.view(-1).mul_(2), y)[1])


def test_nothing_but_the_output_is_kept_for_the_scale():
    """(rows, n) numbers that nobody else holds would be memory on top of the consumer's."""
    tensors = operands()
    y = boft_linear(**tensors)
    output, _ = kept(y)
    assert output.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert not any(t.shape == y.shape for t in saved)
    y.sum().backward(retain_graph=True)
    assert kept(y) is not None
    y.sum().backward()
    assert kept(y) is None


def test_twice_through_one_graph():
    tensors = operands()
    y = boft_linear(**tensors)
    first = torch.autograd.grad(y.sum(), tensors["scale"], retain_graph=True)
    second = torch.autograd.grad(y.sum(), tensors["scale"])
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    """They keep no output; what is computed again is the same."""
    layer = BOFTLinear(64, 24, n_factors=2, block_size=8)
    torch.nn.init.normal_(layer.skew, std=0.3)
    x = torch.randn(70, 64, requires_grad=True)
    leaves = [x, layer.skew, layer.scale_offset]
    wanted = torch.autograd.grad(layer(x).square().sum(), leaves)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    if reentrant:
        y.square().sum().backward()
        got = [t.grad for t in leaves]
    else:
        got = torch.autograd.grad(y.square().sum(), leaves)
    torch.testing.assert_close(tuple(got), wanted, rtol=0, atol=0)


def test_hooks_of_saved_tensors_see_everything():
    seen = []

    def pack(tensor):
        seen.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = boft_linear(**operands())
    assert kept(y) is None
    assert (70, 24) in seen


@pytest.mark.parametrize("dims", [(5,), (2, 40)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_a_new_layer_equals_the_frozen_one(dims, bias, scale):
    base = torch.nn.Linear(64, 24, bias=bias)
    layer = BOFTLinear.from_linear(base, n_factors=2, block_size=8, scale=scale)
    x = torch.randn(*dims, 64)
    assert torch.equal(layer(x), base(x))
    with torch.no_grad():
        assert torch.equal(layer(x), base(x))
    assert natively_served()


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_vectors_that_are_strided(name):
    """The native call wants them contiguous, so that another strategy serves them."""
    tensors = operands()
    wanted = step(tensors)
    strided = tensors[name].detach().repeat_interleave(2)[::2]
    ours = step(tensors | {name: strided.requires_grad_(tensors[name].requires_grad)})
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("grad", [True, False])
def test_tangents_are_refused(grad):
    """Without gradients, too: the operator itself would return none without a word."""
    tensors = {name: t.detach() for name, t in operands().items()}
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        x = forward_ad.make_dual(tensors["x"], torch.ones_like(tensors["x"]))
        with pytest.raises(NotImplementedError, match="jvp"):
            boft_linear(**tensors | {"x": x})


def test_gradients_of_gradients():
    tensors = operands(rows=4, d=16, n=3)
    y = boft_linear(**tensors)
    leaves = [tensors[name] for name in ("x", "skew", "scale")]
    grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    assert natively_served()
    exact = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in tensors.items()}
    y = boft_linear(**exact)
    leaves = [exact[name] for name in ("x", "skew", "scale")]
    grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    wanted = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    for got, want in zip(second, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-2)


def test_autocast_that_is_on_in_backward_alone():
    tensors = operands()
    wanted = step(tensors)[1:]
    y = boft_linear(**tensors)
    leaves = [t for t in tensors.values() if t.requires_grad]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
        got = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weight": torch.randn(24, 63)}, r"weight \(n, d\)"),
        ({"skew": torch.randn(2, 6, 28)}, "skew: expected blocks for 64 features"),
        ({"skew": torch.randn(2, 8, 27)}, r"b\(b-1\)/2"),
        ({"scale": torch.randn(23)}, "scale, bias"),
        ({"bias": torch.randn(24).double()}, "bias: expected the dtype of x"),
        ({"drop_mask": torch.zeros(2, 7, dtype=torch.bool)}, "drop_mask"),
    ],
)
def test_the_operator_checks_its_arguments(change, match):
    """No shape may make a kernel read outside its tensors, whoever calls it."""
    names = "x", "weight", "skew", "drop_mask", "scale"
    tensors = {k: None if t is None else t.detach() for k, t in operands(drop_mask=None).items()}
    call = [(tensors | change)[name] for name in names]
    bias = (tensors | change)["bias"]
    with pytest.raises(RuntimeError, match=match):
        torch.ops.boft_ops.linear_from_skew(*call, 0, bias, False, False)
