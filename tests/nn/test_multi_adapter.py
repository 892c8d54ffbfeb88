"""MultiAdapterLinear: the active list, adapters by row, saving, compiling, and PEFT's order."""

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from torch import nn

from boft_ops import (
    BOFTLinear,
    MultiAdapterLinear,
    OFTLinear,
    adapt,
    load_adapter,
    merge,
    save_adapter,
)
from boft_ops.interop.serve import adapter_rows, load_adapters


def moved(module, std=0.3):
    for parameter in module.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(std * torch.randn_like(parameter))
    return module


def make(options=({}, {"n_factors": 1}, {"block_size": 4, "scale": False}), bias=True, dtype=None):
    layer = MultiAdapterLinear(nn.Linear(32, 24, bias=bias, dtype=dtype))
    for name, kwargs in zip("abc", options, strict=False):
        layer.add_adapter(name, **kwargs)
    return moved(layer)


def alone(layer, name):
    """The one adapter as a BOFTLinear of its own: the same mathematics, other code."""
    adapter = layer.adapters[name]
    twin = BOFTLinear.from_linear(layer.base, **adapter.options())
    with torch.no_grad():
        twin.skew.copy_(adapter.skew)
        if twin.scale_offset is not None:
            twin.scale_offset.copy_(adapter.scale_offset)
    return twin


@pytest.fixture
def quick(backend):
    """Not in the interpreter: its kernels are the same as in test_indexed.py."""
    if backend == "triton":
        pytest.skip("left to the other backends")


@pytest.mark.parametrize("bias", [False, True])
def test_one_active_adapter_is_the_layer_of_its_own(quick, bias):
    layer, x = make(bias=bias), torch.randn(7, 32)
    for name in "abc":
        layer.set_active(name)
        torch.testing.assert_close(layer(x), alone(layer, name)(x), rtol=1e-4, atol=1e-5)
    layer.set_active([])
    assert torch.equal(layer(x), layer.base(x))


def test_starts_as_the_base():
    layer, x = MultiAdapterLinear(nn.Linear(32, 24)), torch.randn(7, 32)
    layer.add_adapter("a")
    assert torch.equal(layer(x), layer.base(x))
    assert torch.equal(layer(x, torch.tensor(0)), layer.base(x))
    assert not layer.base.weight.requires_grad
    assert layer.adapters["a"].skew.requires_grad


def test_active_adapters_multiply_in_the_order_of_the_list():
    layer, x = make(), torch.randn(7, 32)
    layer.set_active(["a", "c", "b"])
    rotated = x
    for name in ("a", "c", "b"):
        rotated = rotated @ alone(layer, name).rotation()
    scale = layer.adapters["a"].scale * layer.adapters["b"].scale
    want = scale * (rotated @ layer.base.weight.T) + layer.base.bias
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.eval().merged_layer()(x), want, rtol=1e-4, atol=1e-5)
    layer.set_active(["b", "c", "a"])
    assert (layer(x) - want).abs().max() > 0.01


def peft_layers(config):
    """PEFT's layer with two adapters, both active."""
    base = nn.Sequential(nn.Linear(32, 24))
    model = peft.get_peft_model(base, config(), adapter_name="a")
    model.add_adapter("b", config())
    for name, parameter in model.named_parameters():
        if "oft_" in name:  # both train: PEFT freezes the one that is not active yet
            nn.init.normal_(parameter, mean=float("oft_s" in name), std=0.3)
    theirs = model.base_model.model[0]
    model.base_model.set_adapter(["a", "b"])
    return model, theirs


def test_the_order_of_peft_oft_is_this_one():
    model, theirs = peft_layers(
        lambda: peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=["0"])
    )
    layer = MultiAdapterLinear(theirs.base_layer)
    for name in "ab":
        adapter = layer.add_adapter(name, n_factors=1, scale=False)
        adapter.skew.data.copy_(-theirs.oft_R[name].weight[None])
    x = torch.randn(7, 32)
    torch.testing.assert_close(layer(x), model(x), rtol=1e-4, atol=1e-5)
    layer.set_active(["b", "a"])
    assert (layer(x) - model(x)).abs().max() > 0.01


def test_the_order_of_peft_boft_is_the_reverse():
    """Its rotations of the weight pile up on the left: x meets the last active one first."""
    model, theirs = peft_layers(lambda: peft.BOFTConfig(boft_block_size=8, target_modules=["0"]))
    layer = MultiAdapterLinear(theirs.base_layer)
    i, j = torch.triu_indices(8, 8, 1)
    for name in "ab":
        adapter = layer.add_adapter(name, n_factors=1)
        matrix = theirs.boft_R[name]
        adapter.skew.data.copy_((-0.5 * (matrix - matrix.mT))[..., i, j])
        adapter.scale_offset.data.copy_(theirs.boft_s[name][:, 0] - 1)
    x = torch.randn(7, 32)
    layer.set_active(["b", "a"])
    torch.testing.assert_close(layer(x), model(x), rtol=1e-4, atol=1e-5)
    layer.set_active(["a", "b"])
    assert (layer(x) - model(x)).abs().max() > 0.01


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_by_their_own_adapter(quick, bias, prepared):
    """Different block sizes, numbers of factors, with and without a scale; all in one batch."""
    layer = make(bias=bias).eval()
    if prepared:
        layer.prepare()
    x, index = torch.randn(8, 32), torch.tensor([2, 0, 0, -1, 1, 2, 1, -1])
    got = layer(x, index)
    for row, i in enumerate(index.tolist()):
        one = layer.base if i < 0 else alone(layer, "abc"[i])
        torch.testing.assert_close(got[row], one(x[row : row + 1])[0], rtol=1e-4, atol=1e-5)
    requests = layer(x.reshape(4, 2, 32), index[:4, None])
    torch.testing.assert_close(requests[1], alone(layer, "a")(x[2:4]), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.index_of(["c", None, "a"]), torch.tensor([2, -1, 0]))


def test_gradients_by_rows():
    layer, x = make(dtype=torch.float64), torch.randn(6, 32, dtype=torch.float64)
    index, upstream = torch.tensor([0, 1, 1, 2, -1, 0]), torch.randn(6, 24, dtype=torch.float64)
    layer(x, index).backward(upstream)
    for i, name in enumerate("abc"):
        twin, mine = alone(layer, name), index == i
        twin(x[mine]).backward(upstream[mine])
        adapter = layer.adapters[name]
        torch.testing.assert_close(adapter.skew.grad, twin.skew.grad)
        if adapter.scale_offset is not None:
            torch.testing.assert_close(adapter.scale_offset.grad, twin.scale_offset.grad)


@pytest.mark.parametrize("index", [None, torch.tensor([0, -1, 1, 2, 2])])
def test_bfloat16(index):
    layer, x = make(), torch.randn(5, 32)
    half = copy.deepcopy(layer)
    half.base.bfloat16()
    want = layer(x, index)
    got = half(x.bfloat16(), index)
    assert got.dtype == torch.bfloat16
    assert half.adapters["a"].skew.dtype == torch.float32
    torch.testing.assert_close(got.float(), want, rtol=0.03, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x, index)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), want, rtol=0.03, atol=0.05)


def test_dropout_is_on_in_training_alone():
    layer = MultiAdapterLinear(nn.Linear(32, 24))
    layer.add_adapter("a", p_component=1.0, p_block=1.0)
    moved(layer)
    x = torch.randn(5, 32)
    scale, base = layer.adapters["a"].scale, layer.base
    want = scale * (base(x) - base.bias) + base.bias  # every block is the identity
    torch.testing.assert_close(layer.train()(x), want)
    assert (layer.eval()(x) - want).abs().max() > 0.01


def test_state_dict_and_deepcopy():
    layer, x = make(), torch.randn(5, 32)
    index = torch.tensor([0, 1, 2, -1, 0])
    fresh = MultiAdapterLinear(nn.Linear(32, 24))
    for name in "abc":
        fresh.add_adapter(name, **layer.adapters[name].options())
    fresh.eval().prepare()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(
        fresh(x, index), layer(x, index)
    )  # the prepared matrices are not used any more
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x, index), layer(x, index))
    with torch.no_grad():
        twin.adapters["a"].skew.zero_()
    assert not torch.equal(twin(x, index), layer(x, index))


def test_prepared_matrices_go_when_something_changes():
    x, index = torch.randn(5, 32), torch.tensor([0, 1, 2, -1, 0])
    state = moved(make()).adapters["a"].state_dict()
    for change in (
        moved,
        lambda layer: layer.adapters["a"].load_state_dict(state),
        lambda layer: setattr(layer.adapters["a"], "skew", nn.Parameter(state["skew"])),
        lambda layer: setattr(layer.adapters["a"].skew, "data", state["skew"].clone()),
        lambda layer: layer.train(),
        lambda layer: layer.double().float(),
    ):
        layer = make().eval().prepare()
        assert layer(x, index).isfinite().all()
        for stage in (matrix for *_, stages in layer._prepared[1] for matrix in stages):
            stage.fill_(torch.nan)
        assert layer(x, index).isnan().any()  # the prepared matrices are used
        change(layer)
        got, fresh = layer(x, index), copy.deepcopy(layer)
        fresh.forget()
        assert torch.equal(got, fresh(x, index))
    with pytest.raises(RuntimeError, match="prepare: expected eval"):
        make().train().prepare()


@torch.inference_mode()
def test_prepared_matrices_of_a_model_made_in_inference_mode():
    """Its parameters have no versions."""
    x, index = torch.randn(5, 32), torch.tensor([0, 1, 2, -1, 0])
    layer = make().eval().prepare()
    before = layer(x, index)
    assert layer._prepared is not None
    layer.adapters["a"].skew.mul_(0.5)
    got = layer(x, index)
    assert not torch.equal(got, before)
    layer.forget()
    assert torch.equal(got, layer(x, index))


def test_names_come_and_go():
    layer, x = make(), torch.randn(2, 32)
    want = alone(layer, "c")(x)
    layer.delete_adapter("b")
    assert (layer.names, layer.active) == (("a", "c"), ("a", "c"))
    torch.testing.assert_close(layer(x, layer.index_of(["c", "c"])), want, rtol=1e-4, atol=1e-5)
    for name, match in (("a", "expected a new one"), ("", "without dots"), ("x.y", "without dots"),
                        ("keys", "expected a new one"), (3, "without dots")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            layer.add_adapter(name)
    with pytest.raises(ValueError, match="Nearest valid"):
        layer.add_adapter("d", block_size=7)
    with pytest.raises(ValueError, match="side: expected 'in'"):
        layer.add_adapter("d", side="out")
    assert layer.names == ("a", "c")
    for wrong in (lambda: layer.set_active(["b"]), lambda: layer.delete_adapter("b"),
                  lambda: layer.index_of(["b"])):  # fmt: skip
        with pytest.raises(ValueError, match="names: expected some of"):
            wrong()
    with pytest.raises(ValueError, match="at most once"):
        layer.set_active(["a", "a"])


def test_merging_refuses_a_base_that_computes_more():
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = nn.Linear(32, 32)
    hooked.register_forward_hook(lambda module, args, y: y + 1)
    for base, error, match in (
        (Own(32, 32), TypeError, "got Own with its own forward"),
        (BOFTLinear(32, 32), TypeError, "got BOFTLinear with its own forward"),
        (hooked, ValueError, "without hooks"),
    ):
        model = nn.Sequential(BOFTLinear(32, 32), MultiAdapterLinear(base))
        model[1].add_adapter("a")
        with pytest.raises(error, match=match):
            merge(model)
        assert isinstance(model[0], BOFTLinear)  # as it was


def test_options_of_a_called_base():
    layer = make()
    layer.add_adapter("d", kaleidoscope=0)
    for options, error, match in (
        ({"kaleidoscope": 2}, ValueError, "kaleidoscope: expected 0 over a base"),
        ({"dtype": torch.complex64}, TypeError, "dtype: expected a dtype of float64"),
    ):
        with pytest.raises(error, match=match):
            layer.add_adapter("e", **options)


def test_bad_arguments():
    layer = make()
    with pytest.raises(ValueError, match="x: expected a last dimension of 32"):
        layer(torch.zeros(2, 31))
    with pytest.raises(ValueError, match=r"index: expected numbers in \[-1, 2\]"):
        layer(torch.zeros(2, 32), torch.tensor([0, 3]))
    with pytest.raises(TypeError, match="base: expected an nn"):
        MultiAdapterLinear(torch.zeros(3))
    with pytest.raises(TypeError, match="in_features: expected a positive int"):
        MultiAdapterLinear(nn.ReLU())
    bare = MultiAdapterLinear(nn.Sequential(nn.Linear(32, 24)), 32, 24)
    assert bare(torch.zeros(2, 32)).shape == (2, 24)


@pytest.mark.parametrize("by_rows", [False, True])
def test_compiled_whole(by_rows):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    layer, x = make().eval(), torch.randn(6, 32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for _ in range(3):
        index = torch.randint(-1, 3, (6,)) if by_rows else None
        torch.testing.assert_close(compiled(x, index), layer(x, index), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    compiled(x, index).sum().backward()
    assert layer.adapters["a"].skew.grad is not None
    if by_rows:  # a number out of range, whose rows are NaN in a graph
        bad = compiled(x, torch.tensor([0, 3, 1, -2, 2, -1]))
        assert bad.isnan().any(1).tolist() == [False, True, False, True, False, False]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.fixture
def served(tmp_path):
    """A pretrained model, and three models finetuned from it, with their files."""
    base, tuned, files = Model(), {}, {}
    for name, targets, options in (
        ("one", ["first", "second"], {"block_size": 4}),
        ("two", ["second"], {"block_size": 4, "n_factors": 3, "scale": False}),
    ):
        tuned[name] = moved(adapt(copy.deepcopy(base), targets, **options)).eval()
        files[name] = tmp_path / f"{name}.safetensors"
        save_adapter(tuned[name], files[name])
    config = peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=["first"])
    tuned["peft"] = moved(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    tuned["peft"].save_pretrained(files.setdefault("peft", tmp_path / "peft"))
    return base, tuned, files


def test_a_batch_of_requests_through_a_whole_model(served):
    base, tuned, files = served
    model = load_adapters(copy.deepcopy(base), files).eval()
    x = torch.randn(5, 3, 16)
    assert torch.equal(model(x), base(x))
    names = ["two", None, "peft", "one", "two"]
    with adapter_rows(model, names):
        got = model(x)
    for row, name in enumerate(names):
        want = (base if name is None else tuned[name])(x[row])
        torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x), base(x))
    with pytest.raises(ValueError, match="expected some of"), adapter_rows(model, ["three"]):
        pass
    with pytest.raises(ValueError, match="got none"), adapter_rows(base, ["one"]):
        pass
    load_adapters(model, {"again": files["one"]})
    with adapter_rows(model, ["again"] * 5):
        torch.testing.assert_close(model(x), tuned["one"](x), rtol=1e-4, atol=1e-5)


def test_a_compiled_model_serves_any_requests_with_one_graph(served):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    base, tuned, files = served
    model = load_adapters(copy.deepcopy(base), files).eval()
    for layer in (model.first, model.second):
        layer.prepare()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(3, 2, 16)
    for names in (["two", None, "one"], ["one", "one", "peft"], [None, "two", "two"]):
        with adapter_rows(model, names), torch.no_grad():
            got = compiled(x)
        for row, name in enumerate(names):
            want = (base if name is None else tuned[name])(x[row])
            torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_choices_of_rows_are_nested_and_of_one_thread(served):
    base, tuned, files = served
    model = load_adapters(copy.deepcopy(base), files).eval()
    x = torch.randn(2, 3, 16)
    with adapter_rows(model, ["one", "two"]):
        want = model(x)
        with adapter_rows(model, ["two", "two"]):
            torch.testing.assert_close(model(x), tuned["two"](x), rtol=1e-4, atol=1e-5)
        assert torch.equal(model(x), want)

    inside = threading.Event()

    def request(name):
        with adapter_rows(model, [name, name]):
            inside.set()
            inside.wait(60)
            return model(x)

    names = ["one", "two"] * 20
    with ThreadPoolExecutor(4) as pool:
        for name, got in zip(names, pool.map(request, names), strict=True):
            torch.testing.assert_close(got, tuned[name](x), rtol=1e-4, atol=1e-5)


def test_choices_of_rows_of_tasks_and_of_other_models(served):
    base, tuned, files = served
    models = [load_adapters(copy.deepcopy(base), files).eval() for _ in range(2)]
    x = torch.randn(2, 3, 16)

    async def request(name):
        with adapter_rows(models[0], [name, name]):
            await asyncio.sleep(0)
            return models[0](x)

    async def both():
        return await asyncio.gather(request("one"), request("two"), return_exceptions=True)

    got, error = asyncio.run(both())
    torch.testing.assert_close(got, tuned["one"](x), rtol=1e-4, atol=1e-5)
    assert "another asyncio task" in str(error)
    assert torch.equal(models[0](x), base(x))

    def other():
        with adapter_rows(models[1], ["two", "two"]):
            return models[1](x)

    with adapter_rows(models[0], ["one", "one"]), ThreadPoolExecutor(1) as pool:
        got = pool.submit(other).result(60)  # does not wait for this one
    torch.testing.assert_close(got, tuned["two"](x), rtol=1e-4, atol=1e-5)


def test_a_layer_of_several_names_is_served_under_each(tmp_path):
    base = Model()
    base.third = base.first
    tuned = moved(adapt(copy.deepcopy(base), ["first"]))
    save_adapter(tuned, tmp_path / "adapter")
    model = load_adapters(base, {"a": tmp_path / "adapter"})
    assert model.third is model.first
    assert isinstance(model.first, MultiAdapterLinear)


def test_all_but_the_adapters_is_frozen(served):
    base, _, files = served
    model = nn.Module()
    model.first, model.second, model.norm = base.first, base.second, nn.LayerNorm(4)
    load_adapters(model, {"one": files["one"]})
    model.other = BOFTLinear(8, 8, block_size=4)
    load_adapters(model, {"two": files["two"]})
    other = {n for n, p in model.other.named_parameters() if p.requires_grad}
    assert other == {"skew", "scale_offset"}
    del model.other
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".adapters." in name for name in trained)
    assert {name.split(".")[2] for name in trained} == {"one", "two"}


def test_loading_a_file_into_prepared_layers(tmp_path):
    model = nn.Sequential(MultiAdapterLinear(nn.Linear(32, 24))).eval()
    model[0].add_adapter("default")
    tuned = moved(copy.deepcopy(model))
    save_adapter(tuned, tmp_path / "adapter")
    x, index = torch.randn(5, 32), torch.zeros(5, dtype=torch.int64)
    compiled = torch.compile(model[0].prepare(), backend="aot_eager")
    compiled(x, index)
    load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(compiled(x, index), tuned[0](x, index))


def test_what_cannot_be_served_leaves_the_model(served, tmp_path):
    base, _, files = served
    strange = {
        "expected rotations and scales alone": adapt(
            Model(), ["first"], modules_to_save=["second"]
        ),
        "got one of outputs": adapt(Model(), ["first"], side="out"),
        "expected a linear layer in the model, got none": nn.Sequential(OFTLinear(16, 32)),
        "a rotation of 16 features": nn.ModuleDict({"first": OFTLinear(32, 32)}),
        "expected a scale of 32": nn.ModuleDict({"first": OFTLinear(16, 8)}),
    }
    for match, model in strange.items():
        save_adapter(model, tmp_path / "strange")
        with pytest.raises(ValueError, match=match):
            load_adapters(base, {"one": files["one"], "strange": tmp_path / "strange"})
        assert type(base.first) is nn.Linear
        assert base.first.weight.requires_grad
    for name in ("a.b", 3):
        with pytest.raises(ValueError, match="name: expected a string without dots"):
            load_adapters(base, {"one": files["one"], name: files["two"]})
        assert type(base.first) is nn.Linear
    attention = nn.ModuleDict({"self_attn": nn.MultiheadAttention(16, 2)})
    ours = nn.ModuleDict({"self_attn": nn.ModuleDict({"out_proj": OFTLinear(16, 16)})})
    save_adapter(ours, tmp_path / "attention")
    with pytest.raises(ValueError, match="without calling it"):
        load_adapters(attention, {"a": tmp_path / "attention"})
    with pytest.raises(ValueError, match="expected a linear layer in the model, got BOFTLinear"):
        load_adapters(adapt(copy.deepcopy(base), ["first"]), {"one": files["one"]})
    load_adapters(base, files)
    with pytest.raises(ValueError, match="one: first: name: expected a new one"):
        load_adapters(base, files)
