"""``cache_merged``: the same layer as without it, and every change of a source is noticed."""

import copy
import gc
import io
import pickle

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import boft_ops
from boft_ops import BOFTLinear, adapt, cache_merged
from boft_ops._runtime.tuned import pinned
from boft_ops.nn import merged_cache
from boft_ops.ops import merged_linear
from boft_ops.ops.merged_linear import LEAST_FACTOR
from boft_ops.ops.planner import plan_choice

SIDES = {"out": {"side": "out"}, "neumann5": {"method": "neumann5"}, "kal": {"kaleidoscope": 1}}


def make(dtype=torch.float64, **options):
    layer = BOFTLinear(32, 16, dtype=dtype, **options)
    nn.init.normal_(layer.skew, std=0.2)
    if layer.scale_offset is not None:
        nn.init.uniform_(layer.scale_offset, -0.5, 1)
    return layer


def rows(dtype=torch.float64, n=6):
    return torch.randn(2, n, 32, dtype=dtype, requires_grad=True)


def step(layer, x, create_graph=False):
    """The output of a layer and the gradients of everything that is trained."""
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), wanted, create_graph=create_graph)]


@pytest.fixture
def made(monkeypatch):
    """The layers whose merged weight was made, in turn."""
    layers, right = [], merged_cache._make
    monkeypatch.setattr(merged_cache, "_make", lambda l, *a: layers.append(l) or right(l, *a))
    return layers


# --- The same layer -------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True, "trained"])
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"scale": False}, {"n_factors": 1}, {"n_factors": 3}),
        *({"frozen": "skew"}, {"frozen": "scale_offset"}),
    ],
    ids=str,
)
def test_a_step_is_that_of_the_layer(made, options, bias):
    frozen = options.get("frozen")
    layer = make(bias=bool(bias), **{k: v for k, v in options.items() if k != "frozen"})
    if frozen:
        getattr(layer, frozen).requires_grad_(False)
    if bias == "trained":
        layer.bias.requires_grad_()
    batches = [rows(n=n) for n in (6, 1, 0)]
    expected = [step(layer, x) for x in batches]
    with cache_merged(layer) as cache:
        for x, want in zip(batches, expected, strict=True):
            torch.testing.assert_close(step(layer, x), want)
        assert made == [layer]
        assert cache.held_bytes == cache.nbytes > layer.frozen_weight.nbytes
    assert layer.kept_weight is None
    torch.testing.assert_close(step(layer, batches[0]), expected[0], rtol=0, atol=0)
    assert len(made) == 1


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_butterfly_of_several_stages(backend, stages):
    layer, x = make(n_factors=3, block_size=4), rows()
    expected = step(layer, x)
    with pinned(plan=plan_choice(stages, False)), cache_merged(layer):
        torch.testing.assert_close(step(layer, x), expected)


def test_accumulated_gradients_are_those_of_the_whole_batch(made):
    model = adapt(
        nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16)).double(), ["0", "2"]
    )
    for name in "0", "2":
        nn.init.normal_(model.get_submodule(name).skew, std=0.2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(8, 32, dtype=torch.float64)
    plain = copy.deepcopy(model)
    others = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    with cache_merged(model):
        for _ in range(3):
            for part in x.split(2):
                model(part).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            plain(x).square().sum().backward()
            others.step()
            others.zero_grad()
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    assert len(made) == 3 * 2  # once a layer and optimizer step


@pytest.mark.parametrize("kind", [*SIDES, "in", "n_identity", "strength"])
def test_evaluation(made, kind):
    layer, x = make(**SIDES.get(kind, {})).eval(), rows().detach()
    if kind == "n_identity":
        layer.interpolate(1)
    if kind == "strength":
        layer.set_strength(0.5)
    with torch.no_grad():
        expected = layer(x)
        with cache_merged(layer) as cache, torch.inference_mode():
            for _ in range(2):
                torch.testing.assert_close(layer(x), expected)
            assert cache.held_bytes == layer.frozen_weight.nbytes
    assert made == [layer]


def test_a_weight_that_inference_mode_made_serves_training(made):
    layer, x = make(), rows()
    expected = step(layer, x)
    with cache_merged(layer):
        with torch.inference_mode():
            layer(x)
        torch.testing.assert_close(step(layer, x), expected)
    assert made == [layer]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("large_bias", [False, True])
def test_errors_are_those_of_the_layer(dtype, large_bias):
    """At most twice the errors of the layer without a cache, against float64."""
    layer = BOFTLinear(256, 96, dtype=dtype)
    nn.init.normal_(layer.skew, std=0.05)
    nn.init.uniform_(layer.scale_offset, -0.5, 1)
    if large_bias:
        nn.init.constant_(layer.bias, 400)
    x = torch.randn(512, 256, dtype=dtype, requires_grad=True)
    grad = torch.randn(512, 96, dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, layer.skew, layer.scale)]
    weight, bias = layer.frozen_weight.double(), layer.bias.double()
    y = reference.linear(wide[0], weight, wide[1], wide[2], bias)
    exact = [y.detach(), *torch.autograd.grad(y, wide, grad.double())]

    def errors():
        y = layer(x)
        got = [y.detach(), *torch.autograd.grad(y, (x, layer.skew, layer.scale_offset), grad)]
        return [(g.double() - e).norm() / e.norm() for g, e in zip(got, exact, strict=True)]

    without = errors()
    with cache_merged(layer):
        for ours, theirs in zip(errors(), without, strict=True):
            assert ours <= 2 * theirs + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("bias", [False, True])
def test_zeros_of_the_scale_are_trained(bias):
    layer, x = make(bias=bias), rows()
    with torch.no_grad():
        layer.scale_offset[3:5] = -1
    expected = step(layer, x)
    with cache_merged(layer):
        got = step(layer, x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=100 * LEAST_FACTOR)
    assert got[3][3] != 0  # the scale's
    with torch.no_grad(), cache_merged(layer.eval()):
        assert torch.equal(layer(x)[..., 3], expected[0][..., 3])


@pytest.mark.parametrize("bias", [False, True])
def test_an_output_may_be_changed_in_place(bias):
    layer, x = make(bias=bias), rows()
    expected = step(layer, x)
    with cache_merged(layer):
        wanted = [x, layer.skew, layer.scale_offset]
        y = layer(x)
        grads = torch.autograd.grad(y.mul(1).square().sum(), wanted, retain_graph=True)
        torch.testing.assert_close([*grads], expected[1:])
        before = y.detach().clone()
        y.relu_()
        grads = torch.autograd.grad(y.sum(), wanted)
    again = layer(x)
    torch.testing.assert_close([*grads], [*torch.autograd.grad(again.relu_().sum(), wanted)])
    torch.testing.assert_close(before, expected[0])


def test_a_kernel_may_write_into_the_output_of_a_gpu_without_a_word(monkeypatch):
    """As those of Liger do, which write gradients into their inputs; here in the place of a GPU."""
    monkeypatch.setattr(merged_linear, "KEEP_OUTPUT", ())
    layer, x = make(bias=False), rows()
    expected = step(layer, x)
    with cache_merged(layer):
        y = layer(x)
        loss = y.square().sum()  # keeps y as well
        (grad,) = torch.autograd.grad(loss, y)
        y.data.copy_(grad)
        got = torch.autograd.grad(y, [x, layer.skew, layer.scale_offset], grad)
    torch.testing.assert_close([*got], expected[1:])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_compute_again_from_the_same_weight(made, reentrant):
    layer, x = make(bias=False), rows()
    expected = step(layer, x)
    with cache_merged(layer):
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.square().sum().backward()
    torch.testing.assert_close([x.grad, layer.skew.grad, layer.scale_offset.grad], expected[1:])
    assert made == [layer]


def test_gradients_of_gradients():
    layer, x = make(), rows(n=2)

    def second():
        _, *grads = step(layer, x, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, layer.skew))

    expected = second()
    with cache_merged(layer):
        torch.testing.assert_close(second(), expected)


def test_batched_gradients():
    layer, x, grads = make(), rows(n=2), torch.randn(3, 2, 2, 16, dtype=torch.float64)

    def batched():
        return torch.autograd.grad(
            layer(x), (x, layer.skew, layer.scale_offset), grads, is_grads_batched=True
        )

    expected = batched()
    with cache_merged(layer):
        torch.testing.assert_close(batched(), expected)


def test_a_backward_has_the_weight_of_its_forward():
    layer, x = make(), rows()
    expected = step(layer, x)
    with cache_merged(layer) as cache:
        y = layer(x)
        cache.drop()
        with torch.no_grad():
            layer.scale_offset.data.mul_(3)
        layer(x)
        grads = torch.autograd.grad(y.square().sum(), [x, layer.skew, layer.scale_offset])
    torch.testing.assert_close([*grads], expected[1:])


def test_autocast():
    layer, x = make(torch.float32), rows(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = step(layer, x)
        with cache_merged(layer):
            got = step(layer, x)
            assert (
                layer.kept_weight.held_bytes() < layer.frozen_weight.nbytes + layer.skew.nbytes * 9
            )
    assert got[0].dtype == torch.bfloat16
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() < 0.02 * other.norm()
    with cache_merged(layer):
        y = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # in backward alone
            got = torch.autograd.grad(y.square().sum(), layer.skew)
    torch.testing.assert_close(got[0], step(layer, x)[1:][1])


# --- What it does not serve -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_new_layer_equals_torchs_bit_for_bit(dtype):
    linear, x = nn.Linear(32, 16, dtype=dtype), rows(dtype)
    layer = BOFTLinear.from_linear(linear)
    with cache_merged(layer) as cache:
        assert torch.equal(layer(x), linear(x))
        with torch.no_grad():
            assert torch.equal(layer.eval()(x), linear(x))
            layer.skew[0, 0, 0] = 0.3
            assert not torch.equal(layer(x), linear(x))
        assert cache.held_bytes > 0


@pytest.mark.parametrize("kind", [*SIDES, "dropout", "trained weight", "float16", "n_identity"])
def test_training_goes_as_before(made, kind):
    dtype = torch.float16 if kind == "float16" else torch.float32
    options = {"p_component": 1.0, "p_block": 0.5} if kind == "dropout" else SIDES.get(kind, {})
    layer, x = make(dtype, **options), rows(dtype)
    if kind == "n_identity":
        layer.interpolate(1)
    layer.frozen_weight.requires_grad_(kind == "trained weight")

    def seeded():
        torch.manual_seed(5)
        return step(layer, x)

    expected = seeded()
    with cache_merged(layer):
        assert all(map(torch.equal, seeded(), expected))
    assert made == []


def test_transforms_and_dispatch_modes_see_the_layer(made):
    layer, x = make(), rows()
    with cache_merged(layer):
        state = {name: p.detach() for name, p in layer.named_parameters()}
        call = lambda s: torch.func.functional_call(layer, s, (x,)).sum()  # noqa: E731
        gradients = torch.func.grad(call)(state)
        with FlopCounterMode(display=False):
            layer(x)
        with forward_ad.dual_level(), torch.no_grad():
            layer(x)
    assert made == []
    expected = torch.autograd.grad(layer(x).sum(), (layer.skew, layer.scale_offset))
    torch.testing.assert_close((gradients["skew"], gradients["scale_offset"]), expected)


def test_compiled_graphs_compute_as_before(made):
    layer, x = make(), rows()
    expected = step(layer, x)
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=lambda g, _: graphs.append(g) or g, fullgraph=True)
    compiled(x)
    with cache_merged(layer):
        layer(x)
        torch.testing.assert_close(step(compiled, x), expected)
        layer.skew.data.mul_(2)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1
    assert len(made) == 2


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
        cache_merged("model")
    with pytest.raises(ValueError, match="model: expected at least one BOFTLinear, got none"):
        cache_merged(nn.Linear(4, 4))
    layer = make()
    with cache_merged(layer), pytest.raises(RuntimeError, match="close"):
        cache_merged(nn.Sequential(layer))
    cache_merged(layer).close()
    with cache_merged(layer), pytest.raises(ValueError, match="last dimension"):
        layer(torch.randn(3, 31, dtype=torch.float64))


# --- Changes --------------------------------------------------------------------------------------


def _in_place(name):
    def change(layer):
        with torch.no_grad():
            getattr(layer, name).add_(0.1)

    return change


def _data(name):
    def change(layer):
        tensor = getattr(layer, name)
        tensor.data = tensor.data + 0.1

    return change


def _data_twice(layer):
    """The memory that the first assignment lets go may not pass for the one that was kept."""
    for _ in range(2):
        layer.skew.data = layer.skew.data + 0.1
        gc.collect()


def _assign(name):
    def change(layer):
        old = getattr(layer, name)
        setattr(layer, name, nn.Parameter(old.detach() + 0.1, requires_grad=old.requires_grad))

    return change


def _assign_the_same_memory(layer):
    skew = nn.Parameter(layer.skew.data)
    with torch.no_grad():
        for _ in range(layer.skew._version):
            skew.add_(0.1)
    layer.skew = skew


def _written_through_data(name):
    return lambda layer: getattr(layer, name).data.add_(0.1)


def _step(layer):
    layer.skew.grad = torch.ones_like(layer.skew)
    torch.optim.Adam([layer.skew], lr=0.1).step()


def _load(layer):
    state = {name: tensor + 0.1 for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state)


def _load_assigned(layer):
    state = {name: tensor + 0.1 for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def _adapter(layer):
    """As ``load_adapter`` writes it."""
    boft_ops.reset_adapters(layer)
    with torch.no_grad():
        layer.skew.copy_(torch.full_like(layer.skew, 0.05))


UNSEEN = "skew.data in place", "scale_offset.data in place"
NAMES = "skew", "scale_offset", "frozen_weight", "bias"
CHANGES = {
    **{f"{name} in place": _in_place(name) for name in NAMES},
    **{f"{name}.data": _data(name) for name in NAMES},
    **{f"new {name}": _assign(name) for name in NAMES},
    **{f"{n}.data in place": _written_through_data(n) for n in NAMES if n != "frozen_weight"},
    "new skew in the same memory": _assign_the_same_memory,
    "skew.data twice": _data_twice,
    "no scale": lambda layer: setattr(layer, "scale_offset", None),
    "optimizer": _step,
    "load_state_dict": _load,
    "load_state_dict assign": _load_assigned,
    "adapter": _adapter,
    "merge, unmerge": lambda layer: layer.merge().unmerge(),
    "merge": lambda layer: layer.merge(),
    "set_strength": lambda layer: layer.set_strength(0.5),
    "interpolate": lambda layer: layer.interpolate(1),
}


NOT_IN_TRAINING = "merge", "set_strength"


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change, trains, looks, monkeypatch):
    """Those in place through ``data`` by a look at the numbers, which a GPU does not take."""
    if (trains and change in NOT_IN_TRAINING) or (not looks and change in UNSEEN):
        pytest.skip("nothing to notice")
    if not looks:
        right = merged_cache.Source.of
        monkeypatch.setattr(merged_cache.Source, "of", lambda tensor, _=False: right(tensor, False))
    layer, x = make().train(trains), rows()
    run = step if trains else torch.no_grad()(lambda layer, x: [layer(x)])
    with cache_merged(layer) as cache:
        before = run(layer, x)
        assert cache.held_bytes
        CHANGES[change](layer)
        got = run(layer, x)
    torch.testing.assert_close(got, run(layer, x))
    assert torch.allclose(got[0], before[0]) == change.startswith("merge")


@pytest.mark.parametrize(
    "drop",
    [
        lambda layer, cache: cache.drop(),
        lambda layer, cache: layer.eval(),
        lambda layer, cache: layer.train(),
        lambda layer, cache: torch.optim.SGD([nn.Parameter(torch.zeros(1))]).step(),
        lambda layer, cache: layer.load_state_dict({}, strict=False),
        lambda layer, cache: layer.to("cpu"),
        lambda layer, cache: layer.merge().unmerge(),
        lambda layer, cache: layer.set_strength(1),
        lambda layer, cache: cache.close(),
    ],
    ids=["drop", "eval", "train", "step", "load", "to", "merge", "strength", "close"],
)
def test_what_is_written_through_data_counts_after_any_of_these(drop):
    layer, x = make(), rows()
    with cache_merged(layer) as cache:
        layer(x)
        layer.frozen_weight.data.mul_(2)
        drop(layer, cache)
        assert cache.held_bytes == 0
        got = layer(x)
    torch.testing.assert_close(got, layer(x))


def test_a_move_to_another_dtype():
    layer, x = make(), rows()
    with cache_merged(layer) as cache:
        layer(x)
        layer.float()
        assert cache.held_bytes == 0
        got = layer(x.float())
    torch.testing.assert_close(got, layer(x.float()))


def test_copies_and_pickles_keep_nothing():
    layer, x = make(), rows()
    with cache_merged(layer) as cache:
        expected = layer(x)
        file = io.BytesIO()
        torch.save(layer, file)
        assert len(file.getvalue()) < cache.held_bytes + 4 * layer.frozen_weight.nbytes
        file.seek(0)
        others = (
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(file, weights_only=False),
        )
        for other in others:
            assert other.kept_weight is None
            torch.testing.assert_close(other(x), expected)


def test_a_closed_or_deleted_cache_leaves_nothing():
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    n_hooks, model = len(hooks), nn.Sequential(make(), make())
    cache = cache_merged(model)
    assert len(hooks) == n_hooks + 1
    del model[1]
    gc.collect()
    model(rows())
    assert 0 < cache.held_bytes < cache.nbytes
    cache.close()
    cache.close()
    assert (cache.held_bytes, len(hooks)) == (0, n_hooks)


def test_parameters_that_wrappers_gather_are_not_kept(made):
    layer, x = make(), rows()
    layer.skew.ds_id = 0  # as ZeRO-3 marks them
    with cache_merged(layer):
        layer(x)
    del layer.skew.ds_id
    layer._hf_hook = object()  # as accelerate does
    with cache_merged(layer):
        layer(x)
    assert made == []


def test_a_frozen_adapter_has_gradients_of_the_rows(made):
    layer, x = make().requires_grad_(False), rows()
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    with cache_merged(layer) as cache:
        (got,) = torch.autograd.grad(layer(x).square().sum(), x)
        assert cache.held_bytes == cache.nbytes == layer.frozen_weight.nbytes
    torch.testing.assert_close(got, want)
    expected = F.linear(x, layer.merged_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(made):
    layer = make(torch.bfloat16).cuda()
    x = torch.randn(64, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    expected = step(layer, x)
    stream = torch.cuda.Stream()
    with cache_merged(layer):
        for one, other in zip(step(layer, x), expected, strict=True):
            assert (one - other).norm() <= 0.02 * other.norm()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # memory belongs to a stream
            step(layer, x)
        torch.cuda.current_stream().wait_stream(stream)
        assert len(made) == 2
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):  # a graph would outlive the weight
            y = layer(x)
        assert len(made) == 2
        graph.replay()
        with torch.no_grad():
            torch.testing.assert_close(y, layer.eval()(x), rtol=0.05, atol=0.05)
