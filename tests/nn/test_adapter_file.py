"""save_adapter and load_adapter: round trips, and files that are wrong, truncated or foreign."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from boft_ops import adapt, load_adapter, merge, save_adapter
from boft_ops.interop.serve import load_adapters


def make(seed=0, d=16):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, d, 2, padding=1), nn.Flatten(2), nn.Linear(16, 16), nn.Linear(16, 3)
    )


def trained(seed=0, **options):
    model = adapt(make(seed), ["0", "2"], **{"block_size": 4, "modules_to_save": ["3"], **options})
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model.eval()


def inputs():
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_adapter(trained(), path)
    return path


@pytest.mark.parametrize("options", [{}, {"side": "out", "scale": False}, {"n_factors": 1}])
@pytest.mark.parametrize("adapted_before", [False, True])
def test_round_trip(tmp_path, options, adapted_before):
    model, path = trained(**options), tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    fresh = trained(**options) if adapted_before else make()
    if adapted_before:
        nn.init.zeros_(fresh[2].skew)
    assert load_adapter(fresh, path) is fresh
    fresh.eval()
    assert torch.equal(fresh(inputs()), model(inputs()))
    expected = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in fresh.named_parameters()} == expected
    assert fresh[2].options() == model[2].options()


def test_only_what_was_finetuned_is_stored(saved):
    tensors = load_file(saved)
    assert set(tensors) == {f"{i}.{part}" for i in (0, 2) for part in ("skew", "scale_offset")} | {
        *("3.weight", "3.bias")
    }
    assert os.listdir(saved.parent) == [saved.name]  # no temporary file is left


def test_a_bare_layer_and_layers_of_different_options(tmp_path):
    model = nn.Sequential(
        adapt(nn.Sequential(nn.Linear(16, 16)), ["0"], block_size=4)[0],
        adapt(nn.Sequential(nn.Linear(16, 16)), ["0"], block_size=8, side="out")[0],
    )
    for layer in model:
        nn.init.normal_(layer.skew)
    save_adapter(model, tmp_path / "two")
    fresh = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    fresh.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k.endswith(("weight", "bias"))}
    )
    x = torch.randn(2, 16)
    assert torch.equal(load_adapter(fresh, tmp_path / "two")(x), model(x))
    save_adapter(model[0], tmp_path / "one")
    twin = adapt(nn.Sequential(nn.Linear(16, 16)), ["0"], block_size=4)[0]
    load_adapter(twin, tmp_path / "one")
    assert torch.equal(twin.skew, model[0].skew)


def test_merged_layers_save_the_same_adapter(tmp_path, saved):
    model = trained()
    model[2].merge()
    save_adapter(model, tmp_path / "merged")
    mine, theirs = load_file(tmp_path / "merged"), load_file(saved)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(ValueError, match="expected unmerged BOFT layers"):
        load_adapter(model, saved)


def test_dtype_and_dropout_of_the_model_are_kept(saved):
    model = adapt(make().bfloat16(), ["0", "2"], block_size=4, modules_to_save=["3"], p_block=0.5)
    load_adapter(model, saved)
    assert model[3].weight.dtype == torch.bfloat16
    assert model[2].dropout.p_block == 0.5


def snapshot(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, {n: (id(m), type(m)) for n, m in model.named_modules()}


def same(before, model):
    state, modules = snapshot(model)
    return modules == before[1] and all(torch.equal(v, before[0][k]) for k, v in state.items())


def rewrite(path, change_tensors=None, **change_metadata):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata, names = file.metadata(), file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    if change_tensors:
        change_tensors(tensors)
    save_file(
        tensors, path, {k: v for k, v in (metadata | change_metadata).items() if v is not None}
    )


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.__setitem__(name, tensor)


FP8 = torch.zeros(3).to(torch.float8_e4m3fn)
SPOILED = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-7]), "not a whole safetensors file"),
    "truncated header": (lambda p: p.write_bytes(p.read_bytes()[:20]), "not a whole safetensors"),
    "empty": (lambda p: p.write_bytes(b""), "not a whole safetensors file"),
    "foreign bytes": (lambda p: p.write_bytes(b"PK\x03\x04" * 99), "not a whole safetensors file"),
    "foreign safetensors": (lambda p: save_file({"w": torch.zeros(2)}, p), "expected a boft_ops"),
    "newer": (lambda p: rewrite(p, format_version="3"), "format version up to 2, got '3'"),
    "long version": (lambda p: rewrite(p, format_version="9" * 5000), "format version up to 2"),
    "odd version": (lambda p: rewrite(p, format_version="²"), "format version up to 2, got '²'"),
    "no version": (lambda p: rewrite(p, format_version=None), "format version"),
    "no layers": (lambda p: rewrite(p, layers=None), "layers"),
    "spoiled layers": (lambda p: rewrite(p, layers='{"0": '), "layers"),
    "layers of another shape": (lambda p: rewrite(p, layers='["0"]'), "layers"),
    "options missing": (lambda p: rewrite(p, layers='{"2": {"block_size": 4}}'), "2"),
    "unknown layer": (
        lambda p: rewrite(p, layers=json.dumps({"9": trained()[2].options()})),
        "'9'",
    ),
    "missing tensor": (lambda p: rewrite(p, drop("2.skew")), "2.skew"),
    "wrong shape": (lambda p: rewrite(p, put("2.skew", torch.zeros(2, 4, 7))), "2.skew"),
    "strange tensor": (lambda p: rewrite(p, put("4.weight", torch.zeros(2))), "4.weight"),
    "wrong dtype": (lambda p: rewrite(p, put("3.bias", torch.zeros(3).long())), "3.bias"),
    "eight bits": (lambda p: rewrite(p, put("3.bias", FP8)), "expected float64, .* got .*float8"),
    "too large": (
        lambda p: rewrite(p, put("3.bias", torch.full((3,), 1e39, dtype=torch.float64))),
        "expected numbers that are finite in torch.float32, got NaN or infinity",
    ),
}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("how", SPOILED)
def test_spoiled_files_leave_the_model_untouched(saved, how, adapted):
    spoil, match = SPOILED[how]
    spoil(saved)
    model = trained(seed=3) if adapted else make(3)
    before = snapshot(model)
    with pytest.raises(ValueError, match=match) as caught:
        load_adapter(model, saved)
    assert saved.name in str(caught.value)
    assert same(before, model)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: make(d=32), "0.s"),
        (lambda: nn.Sequential(*list(make())[:3]), "3."),
        (lambda: trained(block_size=8), "block_size"),
        (lambda: trained(side="out"), "side"),
        (lambda: trained(scale=False), "scale"),
        (lambda: trained(method="neumann5"), "neumann5"),
        (lambda: adapt(make(), ["2"], block_size=4), "BOFT layers"),
        (lambda: nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.ReLU(), nn.Linear(16, 3)), "'2'"),
    ],
)
def test_other_models_are_refused_and_left_alone(saved, model, match):
    model = model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        load_adapter(model, saved)
    assert same(before, model)


def test_no_file_no_adapter_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: expected a file"):
        load_adapter(make(), tmp_path / "nothing")
    with pytest.raises(ValueError, match="model: expected an adapted model"):
        save_adapter(make(), tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        save_adapter(trained(), tmp_path / "no" / "folder")


def test_interpolated_models_are_not_saved_and_missing_parameters_are_seen(saved, tmp_path):
    model = trained()
    model[2].interpolate(1)
    with pytest.raises(ValueError, match=r"expected interpolate\(0\).*'2'"):
        save_adapter(model, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    with pytest.raises(ValueError, match=r"expected interpolate\(0\).*'2'"):
        load_adapter(model, saved)
    rewrite(saved, drop("3.bias"))
    with pytest.raises(ValueError, match=r"expected a tensor '3\.bias', got none"):
        load_adapter(trained(), saved)


def test_a_failed_save_keeps_the_old_file(saved, monkeypatch):
    old = saved.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained(n_factors=1), saved)
    assert saved.read_bytes() == old
    assert os.listdir(saved.parent) == [saved.name]


def test_merge_after_load(saved):
    model = load_adapter(make(), saved).eval()
    y = model(inputs())
    torch.testing.assert_close(merge(model)(inputs()), y)


def test_trained_biases_and_running_statistics_come_back(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))

    model = adapt(base(), ["0"], block_size=4, modules_to_save=["1"])
    model[0].bias.requires_grad_(True)
    model(torch.randn(64, 16) + 3)  # moves the running statistics
    with torch.no_grad():
        model[0].bias += 1
    save_adapter(model, tmp_path / "file")
    fresh = load_adapter(base(), tmp_path / "file")
    assert fresh[0].bias.requires_grad
    x = torch.randn(4, 16)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_a_file_cannot_write_the_frozen_weight(saved):
    rewrite(saved, put("2.weight", torch.zeros(16, 16)))
    with pytest.raises(ValueError, match=r"2\.weight"):
        load_adapter(make(), saved)


def test_parameters_that_share_memory(tmp_path):
    model = adapt(make(), ["2"], block_size=4)
    one = torch.randn(16, 3)
    model[3].weight = nn.Parameter(one.mT[:])
    model[3].register_parameter("other", nn.Parameter(one.mT[:]))
    save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter")
    assert torch.equal(stored["3.weight"], stored["3.other"])
    assert torch.equal(stored["3.weight"], one.mT)


def test_one_parameter_under_two_names_takes_one_tensor(tmp_path):
    apart = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    tied = nn.ModuleDict({"a": apart["a"], "b": apart["a"]})
    model = adapt(apart, ["a", "b"], block_size=4)
    save_adapter(model, tmp_path / "equal")
    nn.init.normal_(model["b"].skew)
    save_adapter(model, tmp_path / "two")
    with pytest.raises(ValueError, match=r"expected one tensor for 'a\.skew' and 'b\.skew'"):
        load_adapter(tied, tmp_path / "two")
    with pytest.raises(ValueError, match="b: expected one rotation of a layer"):
        load_adapters(tied, {"one": tmp_path / "two"})
    load_adapters(copy.deepcopy(tied), {"one": tmp_path / "equal"})
    load_adapter(tied, tmp_path / "equal")


def test_a_file_of_impossible_size_is_refused_before_anything_is_made(saved):
    layers = {"2": trained()[2].options() | {"kaleidoscope": 10**13}}
    tensors = {name: t for name, t in load_file(saved).items() if name.startswith("2.")}
    metadata = {"format": "boft_ops", "format_version": "2", "layers": json.dumps(layers)}
    save_file(tensors, saved, metadata)
    with pytest.raises(ValueError, match="2: kaleidoscope: 10000000000000 is not what its skew"):
        load_adapter(make(), saved)


def test_links_and_long_names(tmp_path):
    target, link = tmp_path / ("x" * 250), tmp_path / "link"
    link.symlink_to(target)
    save_adapter(trained(), link)
    assert link.is_symlink()
    assert load_adapter(make(), target) is not None
