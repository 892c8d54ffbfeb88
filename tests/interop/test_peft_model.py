"""The usual work with a PEFT model, done with an accelerated one: the behaviors of PEFT's own
unit tests, and those of accelerate, restore and patched themselves."""

import copy
import os
import pickle
import threading
import warnings

import peft
import pytest
import torch
from peft.tuners.boft import layer as peft_boft
from peft.tuners.oft import layer as peft_oft
from peft_models import assert_same, boft, mlp, net, oft, step, tuned
from torch import nn

from boft_ops.interop.peft import accelerate, patched, restore

CONVOLUTIONS = ("conv", "point", "hidden", "out")
# m > 1 wherever it fits: none of these could be made without PEFT's extension
CASES = {
    "boft": (mlp, boft(m=2)),
    "boft_dropout": (mlp, boft(m=2, p=0.5)),
    "boft_conv": (net, boft(CONVOLUTIONS, b=2, m=2)),
    "oft": (mlp, oft()),
    "oft_neumann": (mlp, oft(use_cayley_neumann=True)),
    "oft_conv": (net, oft(CONVOLUTIONS)),
}
pytestmark = pytest.mark.filterwarnings("ignore:boft_ops.*overlapping")


def made(case, **changes):
    make, config = CASES[case]
    base, x = make()
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    with patched():
        return tuned(base, config), base, x


def close(got, want, atol=2e-5):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=atol)


def differ(a, b):
    return (a - b).abs().max() > 1e-3


def train(model, x, steps=3, lr=0.1):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("case", CASES)
def test_identity_at_initialisation(case):
    model, base, x = made(case, init_weights=True)
    close(model(x), base(x), atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_only_the_adapter_is_trained(case):
    model, base, x = made(case)
    train(model, x)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("boft_" in name or "oft_" in name)
        if not parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace("base_layer.", "")
            assert torch.equal(parameter, base.get_parameter(name))


@pytest.mark.parametrize("case", CASES)
def test_disabling(case):
    model, base, x = made(case)
    train(model, x, lr=0.01)
    model.eval()
    before = model(x)
    assert differ(before, base(x))
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), before)
    assert torch.equal(copy.deepcopy(model).unload()(x), base(x))
    model.merge_adapter()
    with model.disable_adapter():
        close(model(x), base(x))  # unmerges, as PEFT does
    close(model(x), before)


@pytest.mark.parametrize("case", CASES)
def test_merging_and_unloading(case):
    model, base, x = made(case)
    model.eval()
    before = model(x)
    assert differ(before, base(x))
    model.merge_adapter()
    close(model(x), before)
    model.unmerge_adapter()
    close(model(x), before)
    plain = model.merge_and_unload(safe_merge=True)
    close(plain(x), before)
    assert {type(m) for m in plain.modules()} == {type(m) for m in base.modules()}


def test_a_broken_adapter_is_not_merged():
    model, base, _ = made("boft")
    layer = model.base_model.model[0]
    layer.boft_s["default"].data[3] = torch.inf
    with pytest.raises(ValueError, match="NaNs detected in the merged weights: adapter 'default'"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, base[0].weight)
    assert not layer.merged


@pytest.mark.parametrize("case", CASES)
def test_saving_and_loading(case, tmp_path):
    model, base, x = made(case)
    train(model, x, lr=0.01)
    model.eval()
    keys = set(model.state_dict())
    model.save_pretrained(tmp_path)
    with patched():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert set(loaded.state_dict()) == keys
    assert torch.equal(loaded.eval()(x), model(x))
    with patched():
        loaded = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True
        )
    assert torch.equal(loaded.eval()(x), model(x))


@pytest.mark.parametrize("case", ["boft", "oft", "oft_conv"])
def test_files_are_those_of_peft(case, tmp_path, peft_extension):
    """Stock PEFT reads what an accelerated model saved, and the other way around."""
    model, base, _ = made(case)
    model.save_pretrained(tmp_path)
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert not any(type(m).__module__.startswith("boft_ops") for m in stock.modules())
    state = model.state_dict()
    assert stock.state_dict().keys() == state.keys()
    for name, value in stock.state_dict().items():
        assert torch.equal(value, state[name])


def test_a_checkpoint_with_two_factors_is_loaded_into_an_accelerated_model(tmp_path):
    model, base, x = made("boft")
    model.save_pretrained(tmp_path)
    other = accelerate(tuned(base, boft()))
    other.load_adapter(tmp_path, adapter_name="two")
    other.set_adapter("two")
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_adapters_of_different_block_sizes():
    """PEFT keeps one permutation for all: the last adapter's."""
    base, x = mlp()
    with patched():
        model = tuned(base, boft(b=4, m=2), other=boft(b=8), third=oft_like())
        alone = [tuned(base, c) for c in (boft(b=4, m=2), boft(b=8), oft_like())]
    outputs = []
    for name, single in zip(("default", "other", "third"), alone, strict=True):
        state = {
            key: value
            for key, value in model.state_dict().items()
            if ".boft_" not in key or key.endswith(f".{name}")
        }
        single.load_state_dict({k.replace(f".{name}", ".default"): v for k, v in state.items()})
        model.set_adapter(name)
        outputs.append(model(x))
        assert torch.equal(outputs[-1], single(x))
    assert differ(outputs[0], outputs[1])
    assert differ(outputs[1], outputs[2])
    model.base_model.set_adapter(["other", "default"])
    y = model(x)
    model.merge_adapter()
    close(model(x), y)


def oft_like():
    return boft(b=0, boft_block_num=2, m=1)


@pytest.mark.parametrize("tuner", [boft, oft])
def test_switching_adding_and_deleting_adapters(tuner):
    base, x = mlp()
    model = accelerate(tuned(base, tuner()))
    first = model(x)
    model.add_adapter("other", tuner(b=8))
    assert torch.equal(model(x), first)
    model.set_adapter("other")
    second = model(x)
    assert differ(first, second)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".other" in name for name in trained)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    assert not list(model.buffers()) or tuner is oft


def test_adapters_on_different_layers():
    base, x = mlp()
    with patched():
        model = tuned(base, boft(["0"], m=2), other=boft(["2"], m=2))
    alone = base[2](torch.tanh(model.base_model.model[0](x)))
    close(model(x), alone, atol=1e-6)
    model.set_adapter("other")
    close(model(x), model.base_model.model[2](torch.tanh(base[0](x))), atol=1e-6)
    model.base_model.set_adapter(["default", "other"])
    y = model(x)
    model.merge_adapter()
    close(model(x), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["boft", "oft", "oft_neumann"])
def test_casts(case, dtype):
    model, _, x = made(case)
    exact = model(x)
    model.to(dtype)
    y = model(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    model.merge_adapter()
    torch.testing.assert_close(model(x.to(dtype)).float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_half_precision_base(autocast_adapter_dtype):
    base, x = mlp()
    with patched():
        model = peft.get_peft_model(
            base.bfloat16(), boft(m=2), autocast_adapter_dtype=autocast_adapter_dtype
        )
    parameter = model.base_model.model[0].boft_R["default"]
    assert parameter.dtype == (torch.float32 if autocast_adapter_dtype else torch.bfloat16)
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert parameter.grad.dtype == parameter.dtype


@pytest.mark.parametrize("case", CASES)
def test_copies_and_pickles(case):
    model, _, x = made(case)
    model.eval()
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    layer = next(m for m in model.modules() if isinstance(m, peft_boft.Linear | peft_oft.Linear))
    assert type(pickle.loads(pickle.dumps(layer))) is type(layer)


@pytest.mark.parametrize("case", ["boft", "boft_conv", "oft", "oft_neumann"])
def test_restoring(case):
    make, config = CASES[case]
    config = copy.deepcopy(config)
    config.boft_n_butterfly_factor = 1
    if case == "boft_conv":
        config.target_modules = ["point", "hidden"]
    base, x = make()
    model = tuned(base, config)
    want, buffers = step(model, x), dict(model.named_buffers())
    types = [type(m) for m in model.modules()]
    assert accelerate(model) is model
    assert [type(m) for m in model.modules()] != types
    assert accelerate(model) is model  # once too often
    assert restore(model) is model
    assert [type(m) for m in model.modules()] == types
    assert {n: b.tolist() for n, b in model.named_buffers()} == {
        n: b.tolist() for n, b in buffers.items()
    }
    assert_same(step(model, x), want, rtol=0, atol=0)


def test_restoring_layers_without_adapters():
    """PEFT leaves them behind where it deletes an adapter; they may be given another one."""
    base, x = mlp()
    model = accelerate(tuned(base, boft(["0"]), other=boft(["2"])))
    model.delete_adapter("default")
    model.set_adapter("other")
    y = model(x)
    assert type(restore(model).base_model.model[0]) is peft_boft.Linear
    close(model(x), y)
    assert torch.equal(model.base_model.model[0](x), base[0](x))
    model.add_adapter("default", boft(["0"]))
    model.set_adapter("default")
    y = model(x)
    assert differ(y, base(x))
    close(accelerate(model)(x), y)


def test_restoring_many_factors(peft_extension):
    """The permutations come back as PEFT makes them."""
    base, x = mlp()
    model = tuned(base, boft(b=2, m=3))
    want, buffers = step(model, x), dict(model.named_buffers())
    restore(accelerate(model))
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert_same(step(model, x), want, rtol=0, atol=0)


def test_what_cannot_be_restored():
    model, _, x = made("boft")
    y = model(x)
    with pytest.raises(RuntimeError, match=r"base_model\.model\.0.*CUDA extension"):
        restore(model)
    assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match="expected at least one accelerated layer"):
        restore(mlp()[0])


def test_patching_ends_with_the_block():
    base, _ = mlp()
    before = vars(peft.tuners.boft.model)["Linear"], peft_boft.get_fbd_cuda
    with pytest.raises(ValueError, match="Invalid combination"), patched(), patched():
        tuned(base, boft(b=8, m=3))
    assert before == (vars(peft.tuners.boft.model)["Linear"], peft_boft.get_fbd_cuda)
    assert type(tuned(base, oft()).base_model.model[0]) is peft_oft.Linear


def test_patching_in_two_threads():
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with patched():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    threading.Timer(0.1, leave.set).start()
    with patched():
        assert leave.is_set()  # it waited for the other
    thread.join()
    assert vars(peft.tuners.oft.model)["Linear"] is peft_oft.Linear


class Grouped(nn.Sequential):
    def __init__(self):
        embedding = nn.Embedding(10, 8)
        tall, grouped = nn.Conv2d(8, 8, (1, 3)), nn.Conv2d(8, 8, 1, groups=2)
        super().__init__(embedding, tall, grouped, nn.Linear(8, 8))


def test_what_stays_peft_is_named_once():
    model = tuned(Grouped(), oft(["0", "2", "3"]))
    stock = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="boft_ops") as caught:
        accelerate(model)
    (message,) = [str(w.message) for w in caught]
    assert "base_model.model.0: not accelerated, as there is no accelerated form of" in message
    assert "base_model.model.2: not accelerated, as groups > 1" in message
    assert "base_model.model.3" not in message
    types = [type(m).__module__.startswith("boft_ops") for m in model.base_model.model]
    assert types == [False, False, False, True]
    tokens = torch.randint(0, 10, (2, 5))
    assert torch.equal(model.base_model.model[0](tokens), stock.base_model.model[0](tokens))
    with pytest.warns(UserWarning, match="groups > 1"), patched():
        made = tuned(Grouped(), oft(["0", "2", "3"]))
    types = [type(m).__module__.startswith("boft_ops") for m in made.base_model.model]
    assert types == [False, False, False, True]


class Custom(peft_oft.Linear):
    pass


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda layer: setattr(layer, "forward", layer.forward), "replaced on the instance"),
        (lambda layer: setattr(layer, "__class__", Custom), "no accelerated form of .*Custom"),
    ],
)
def test_layers_with_code_of_their_own(spoil, why):
    model = tuned(mlp()[0], oft())
    spoil(model.base_model.model[0])
    with pytest.warns(UserWarning, match=rf"base_model\.model\.0: not accelerated, as .*{why}"):
        accelerate(model)


@pytest.mark.parametrize(
    ("kernel", "spoil", "why"),
    [
        (1, nn.utils.parametrizations.weight_norm, "parametrized"),
        ((1, 3), lambda conv: None, "not square"),
    ],
)
def test_convolutions_that_stay_peft(kernel, spoil, why):
    model = tuned(nn.Sequential(nn.Conv2d(8, 8, kernel)), oft(["0"]))
    spoil(model.base_model.model[0].base_layer)
    with pytest.warns(UserWarning, match=why):
        accelerate(model)
    assert type(model.base_model.model[0]) is peft_oft.Conv2d


def test_factors_that_peft_lowered_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tuned(mlp()[0], boft(m=2))
    with pytest.warns(UserWarning, match=r"adapter 'default'.*n_factors is 1, not 2"):
        accelerate(model)


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        ([], TypeError, "model: expected an nn.Module, got list"),
        (nn.Linear(2, 2), ValueError, "expected BOFT or OFT layers of PEFT"),
    ],
)
def test_what_is_no_peft_model(model, error, match):
    with pytest.raises(error, match=match):
        accelerate(model)


def test_ddp(monkeypatch):
    """One process, as Trainer wraps a model."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setitem(os.environ, name, value)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, _, x = made("boft_dropout")
        want = step(model, x)
        y, grads = step(nn.parallel.DistributedDataParallel(model), x)
        grads = {name.removeprefix("module."): grad for name, grad in grads.items()}
        assert_same((y, grads), want, rtol=0, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()
