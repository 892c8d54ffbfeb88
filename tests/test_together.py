"""Rotations of many layers in one launch, and the hook that computes a model's so."""

import copy
import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from boft_ops import BOFTLinear, Together, boft_linear, butterfly_matmul, cayley, rotations
from boft_ops import together as together_module
from boft_ops._runtime import backend as backends


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert together_module._thread.steps == []


def skews(m, b, counts=(1, 3, 2), dtype=torch.float64):
    return [
        (0.4 * torch.randn(m, n << (m - 1), b * (b - 1) // 2, dtype=dtype)).requires_grad_()
        for n in counts
    ]


@pytest.mark.parametrize(("m", "b"), [(1, 3), (1, 8), (2, 8), (3, 4)])
def test_rotations_are_the_groups_of_each_butterfly(backend, m, b):
    several = skews(m, b)
    drops = [None, torch.rand(several[1].shape[:2]) < 0.5, None]
    for masks in (None, drops):
        stages = rotations(several, masks)
        for i, (skew, stage) in enumerate(zip(several, stages, strict=True)):
            blocks = cayley(skew)
            if masks and masks[i] is not None:
                eye = torch.eye(b, dtype=blocks.dtype)
                blocks = torch.where(masks[i][..., None, None], eye, blocks)
            eye = torch.eye(skew.shape[1] * b, dtype=torch.float64)
            dense = butterfly_matmul(eye, blocks)
            torch.testing.assert_close(torch.block_diag(*stage), dense)
            upstream = torch.randn_like(stage)
            got = torch.autograd.grad(stage, skew, upstream, retain_graph=True)
            want = torch.autograd.grad(dense, skew, torch.block_diag(*upstream))
            torch.testing.assert_close(got, want)


def test_one_launch_for_all(monkeypatch):
    calls = []
    real = backends.Op.__call__
    monkeypatch.setattr(
        backends.Op, "__call__", lambda self, *a: calls.append(self.name) or real(self, *a)
    )
    stages = rotations(skews(2, 8))
    sum(stage.sum() for stage in stages).backward()
    assert calls == ["rotation", "rotation_backward"]


def test_gradients_of_gradients():
    several = skews(2, 4, (1, 2))
    assert torch.autograd.gradgradcheck(lambda *s: tuple(rotations(s)), several, fast_mode=True)


def test_float16_is_computed_in_float32():
    (stage,) = rotations(skews(2, 8, (2,), torch.float16))
    assert stage.dtype == torch.float32
    torch.testing.assert_close(stage @ stage.mT, torch.eye(16).expand(2, 16, 16))


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_layer_with_a_given_rotation(side):
    x, weight = torch.randn(5, 32, dtype=torch.float64), torch.randn(32, 32, dtype=torch.float64)
    scale, bias = torch.randn(2, 32, dtype=torch.float64)
    (skew,) = skews(2, 8, (2,))
    arguments = [t.requires_grad_() for t in (x, scale, bias)]

    def run(**options):
        y = boft_linear(x, weight, skew, scale, bias, side=side, **options)
        return y, *torch.autograd.grad(y, [*arguments, skew], torch.ones_like(y) + y.detach())

    for got, want in zip(run(rotation=rotations([skew])[0]), run(), strict=True):
        torch.testing.assert_close(got, want)


def model(**options):
    torch.manual_seed(0)
    layers = [BOFTLinear(32, 64, **options), torch.nn.GELU(), BOFTLinear(64, 32, **options)]
    layers += [BOFTLinear(32, 32, n_factors=1, block_size=4, **options)]
    layers += [BOFTLinear(32, 32, method="neumann5", **options)]
    found = torch.nn.Sequential(*layers).double()
    for name, parameter in found.named_parameters():
        if name.endswith("skew"):
            torch.nn.init.normal_(parameter, std=0.2)
    return found


def step(net, x, forward=None):
    torch.manual_seed(7)  # of the masks
    y = (forward or net)(x)
    y.square().sum().backward()
    grads = [p.grad for p in net.parameters() if p.requires_grad]
    for parameter in net.parameters():
        parameter.grad = None
    return y.detach(), *grads


def test_a_model_computes_the_same_together(monkeypatch):
    x = torch.randn(6, 32, dtype=torch.float64)
    expected = step(model(), x)
    net = model()
    together = Together(net)
    calls = []
    real = backends.Op.__call__
    monkeypatch.setattr(
        backends.Op, "__call__", lambda self, *a: calls.append(self.name) or real(self, *a)
    )
    for got, want in zip(step(net, x), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert calls.count("rotation") == 2  # (2, 8) and (1, 4); neumann5 has none
    assert calls.count("cayley") == 0
    together.remove()
    calls.clear()
    step(net, x)
    assert calls.count("rotation") == 2  # a launch for each layer of two factors
    assert calls.count("cayley") == 1


def test_dropout_and_checkpointing_see_one_mask_per_step():
    x = torch.randn(6, 32, dtype=torch.float64)
    net = model(p_component=1.0, p_block=0.5)
    together = Together(net)
    plain = step(net, x)
    again = step(net, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert (plain[1] == 0).any()

    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return checkpoint(self.net[2], self.net[1](checkpoint(self.net[0], x,
                              use_reentrant=False)), use_reentrant=False)  # fmt: skip

    together.remove()
    both = Checkpointed()
    with_checkpoints = Together(both)
    ours = step(both, x)
    with_checkpoints.remove()

    class Plain(Checkpointed):
        def forward(self, x):
            return self.net[2](self.net[1](self.net[0](x)))

    other = Plain()
    Together(other)
    torch.testing.assert_close(ours[:6], step(other, x)[:6])


class Blocks(torch.nn.Module):
    """Each layer in a checkpoint of its own."""

    def __init__(self, reentrant=False):
        super().__init__()
        self.net, self.reentrant = model(p_component=1.0, p_block=0.5), reentrant

    def forward(self, x, keep=True):
        for layer in self.net[:3]:
            again = dict(use_reentrant=self.reentrant)
            x = checkpoint(layer, x, **again) if keep else layer(x)
        return x


def gradients(net, losses):
    for loss in losses:
        loss.backward()
    found = [p.grad for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    return found


def assert_the_same_in_checkpoints(net, outputs):
    """The gradients of ``outputs(keep)``, with layers in checkpoints (keep) and without."""
    found = []
    for keep in (True, False):
        torch.manual_seed(7)  # of the masks
        found.append(gradients(net, [outputs(keep).square().sum()]))
    torch.testing.assert_close(*found)


def test_checkpoints_of_several_steps_each_see_their_own_masks():
    net = Blocks()
    Together(net)
    x = torch.randn(2, 6, 32, dtype=torch.float64)

    def steps(keep):
        torch.manual_seed(7)
        losses = [net(x[i], keep).square().sum() for i in (0, 1)]
        with torch.no_grad():
            net.eval()(x[0])  # an evaluation in between
        net.train()
        return losses

    for order in (slice(None), slice(None, None, -1)):
        ours, want = (gradients(net, steps(keep)[order]) for keep in (True, False))
        torch.testing.assert_close(ours, want)
    together = sum(steps(True))
    torch.testing.assert_close(gradients(net, [together]), want)


def test_a_step_of_what_another_one_made():
    """A checkpoint whose input comes straight from the step before, past its own layer."""

    class Past(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (BOFTLinear(32, 32, p_component=1.0, p_block=0.5) for _ in range(2))
            torch.nn.init.normal_(self.a.skew)
            torch.nn.init.normal_(self.b.skew)

        def past(self, x):
            y = self.a(x)
            for _ in range(4):
                y = y.sin()
            return y * x

        def forward(self, x, keep):
            y = checkpoint(self.past, x, use_reentrant=False) if keep else self.past(x)
            return self.b(y)

    net = Past().double()
    Together(net)
    x = torch.ones(6, 32, dtype=torch.float64)
    assert_the_same_in_checkpoints(net, lambda keep: net(net(x, keep), keep))


def test_a_model_that_calls_itself():
    class Twice(Blocks):
        def forward(self, x, keep=True, inner=True):
            x = super().forward(x, keep)
            return super().forward(self(x, keep, False), keep) if inner else x

    net = Twice()
    Together(net)
    x = torch.randn(6, 32, dtype=torch.float64)
    assert_the_same_in_checkpoints(net, lambda keep: net(x, keep))


def test_a_model_with_the_hook_twice_and_one_in_another():
    net, x = Blocks(), torch.randn(6, 32, dtype=torch.float64)
    Together(net)
    Together(net)
    Together(net.net)
    assert_the_same_in_checkpoints(net, lambda keep: net(x, keep))


def test_an_interrupted_step_is_forgotten():
    net, x = Blocks(), torch.randn(6, 32, dtype=torch.float64)
    Together(net)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = net.net[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        net(x)
    handle.remove()
    assert_the_same_in_checkpoints(net, lambda keep: net(x, keep))


def test_graphs_of_two_threads():
    net, x = Blocks(), torch.randn(6, 32, dtype=torch.float64)
    Together(net)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(net, x).result()
    mine = net(x)
    with pytest.raises(RuntimeError, match="steps of one thread"):
        mine.sum().backward()
    del other
    net(x).sum().backward()


def test_parameters_that_are_put_together_at_the_layer():
    """As by FSDP, whose shards are 1-D at the start of the model's forward."""
    net, x = model(), torch.randn(6, 32, dtype=torch.float64)
    want, whole = net(x), net[0].skew
    Together(net)
    net[0].skew = torch.nn.Parameter(whole.detach().flatten()[:7])
    net[0].register_forward_pre_hook(lambda layer, _: setattr(layer, "skew", whole))
    torch.testing.assert_close(net(x), want)


def test_parameters_of_inference_mode():
    with torch.inference_mode():
        net = model()
        Together(net)
        assert net(torch.randn(6, 32, dtype=torch.float64)).isfinite().all()


def test_nothing_of_a_step_outlives_its_graph():
    net = Blocks()
    Together(net)
    loss = net(torch.randn(6, 32, dtype=torch.float64)).sum()
    assert len(together_module._graphs) == 1
    del loss
    assert len(together_module._graphs) == 0


def test_in_a_reentrant_checkpoint_a_layer_computes_its_own():
    net, x = Blocks(reentrant=True), torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    Together(net)

    def loss(x):
        torch.manual_seed(7)
        return net(x).square().sum()

    loss(x).backward()
    direction = torch.randn_like(x)
    slope = (loss(x + 1e-4 * direction) - loss(x - 1e-4 * direction)).detach() / 2e-4
    torch.testing.assert_close((x.grad * direction).sum(), slope, rtol=1e-5, atol=1e-5)

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = BOFTLinear(32, 32)

        def forward(self, x):
            return checkpoint(self.layer, self.layer(x), use_reentrant=True)

    both = Both()
    torch.nn.init.normal_(both.layer.skew)
    Together(both)
    with pytest.raises(RuntimeError, match="a reentrant one as well"):
        both(torch.randn(2, 32)).sum().backward()


def test_a_frozen_layer_keeps_its_masks_for_a_checkpoint():
    net, x = Blocks(), torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    net.requires_grad_(False)
    Together(net)
    found = []
    for keep in (True, False):
        torch.manual_seed(7)
        found += torch.autograd.grad(net(x, keep).square().sum(), x)
    torch.testing.assert_close(*found)


def test_threads_run_steps_of_their_own():
    net = model()
    Together(net)
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    want = [net(one).square().sum(1) for one in x]
    turn = threading.Barrier(2)
    net[1].register_forward_hook(lambda *_: (turn.wait(60), None)[1])
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda one: net(one).square().sum(1), x))
    torch.testing.assert_close(got, want)
    for y in got:  # each through the graph of its own step
        y.sum().backward()


def test_transforms_of_torch_func():
    net, x = model(), torch.randn(6, 32, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    want = torch.func.grad(loss)(parameters)
    Together(net)
    torch.testing.assert_close(torch.func.grad(loss)(parameters), want)


def test_nothing_stale_is_used():
    net = model()
    Together(net)
    x = torch.randn(4, 32, dtype=torch.float64)
    net(x).sum().backward()
    layer = net[0]
    layer(x).sum().backward()  # outside of a step: its own rotation, its own graph
    with torch.no_grad():
        layer.skew.mul_(2)
    fresh = copy.deepcopy(layer)
    torch.testing.assert_close(layer(x), fresh(x))
    with torch.no_grad():
        before = net(x)
    net(x).sum().backward()  # after an evaluation without gradients
    assert layer.skew.grad is not None
    layer.interpolate(1)
    assert not torch.equal(net(x), before)
    layer.interpolate(0)
    net.apply(lambda module: module.merge() if isinstance(module, BOFTLinear) else None)
    torch.testing.assert_close(net.eval()(x), before)


def test_a_failing_step_leaves_nothing_behind():
    net = model()
    Together(net)
    x = torch.randn(4, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="last dimension"):
        net(x[:, :31])
    net[0](x).sum().backward()  # twice through a graph of its own, not through that of the step
    net[0](x).sum().backward()


def test_a_model_can_still_be_copied_and_pickled():
    net = model()
    together = Together(net)
    x = torch.randn(2, 32, dtype=torch.float64)
    y = net(x)
    together.remove()
    torch.testing.assert_close(copy.deepcopy(net)(x), y)
    torch.testing.assert_close(pickle.loads(pickle.dumps(net))(x), y)


def test_compiled_models_compute_their_own():
    net = model()
    Together(net)
    x = torch.randn(3, 32, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))


def test_a_compiled_model_does_not_look_at_those_of_others():
    """Which may be freed at any time, also between its tracing and its guards."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    other, net, x = model(), model(), torch.randn(3, 32, dtype=torch.float64)
    Together(other)
    other(x)
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    compiled(x)
    del other
    gc.collect()
    compiled(x)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([torch.zeros(2, 4, 28), torch.zeros(1, 4, 28)],), ValueError, r"skews\[1\]: expected sh"),
        (([torch.zeros(2, 4, 28), torch.zeros(2, 4, 28).double()],), TypeError, r"skews\[1\]"),
        (([torch.zeros(2, 3, 28)],), ValueError, "n_factors"),
        (([torch.zeros(4, 8, 120)],), ValueError, r"<= 64 features, got 128"),
        (([torch.zeros(2, 4, 28)], []), ValueError, "drops: expected 1"),
        (([torch.zeros(2, 4, 28)], [torch.zeros(2, 4)]), TypeError, r"drops\[0\]: expected a bool"),
        (([torch.zeros(2, 4, 28)], [[True]]), TypeError, r"drops\[0\]: .* got list"),
        (([torch.zeros(2, 4, 28)], [torch.zeros(2, 5) > 0]), ValueError, r"drops\[0\]: .*\(2, 4\)"),
        (([torch.zeros(2, 4, 28)], [torch.zeros(2, 4, device="meta") > 0]), ValueError, "its skew"),
        ((["skew"],), TypeError, r"skews\[0\]: expected a torch.Tensor"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        rotations(*arguments)


def test_bad_rotation_of_a_layer():
    x, weight, skew = torch.randn(2, 16), torch.randn(4, 16), torch.zeros(2, 2, 28)
    with pytest.raises(
        ValueError, match=r"rotation: expected shape \(1, 16, 16\), got \(2, 8, 8\)"
    ):
        boft_linear(x, weight, skew, rotation=torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="dropout: expected None beside a rotation"):
        boft_linear(x, weight, skew, rotation=torch.zeros(1, 16, 16), dropout=(0.5, 0.5))
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        Together("model")
