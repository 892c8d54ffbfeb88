"""Slots: numbers that stay, tables written in place, one graph for all that come and go."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from boft_ops import MultiAdapterLinear, adapt, save_adapter
from boft_ops.interop.serve import adapter_rows, load_adapters

D, N = 32, 24


def add(layer, name, seed, **options):
    """An adapter with random numbers, put in as ``load_adapters`` does it: with its numbers."""
    adapter = layer.new_adapter(name, **({"block_size": 8} | options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        adapter.skew.copy_(0.3 * torch.randn(adapter.skew.shape, generator=generator))
        if adapter.scale_offset is not None:
            adapter.scale_offset.copy_(0.3 * torch.randn(N, generator=generator))
    return layer.put_adapter(name, adapter, active=False)


def make(count, dtype=None, slots=None, **options):
    torch.manual_seed(0)
    layer = MultiAdapterLinear(nn.Linear(D, N, dtype=dtype), slots=slots).eval()
    for i in range(count):
        add(layer, f"a{i}", i, **options)
    return layer


def expected(layer, x, names):
    rows = []
    for row, name in zip(x, names, strict=True):
        layer.set_active([name] if name else [])
        rows.append(layer(row[None])[0])
    layer.set_active([])
    return torch.stack(rows)


def assert_serves(layer, names, call=None):
    x = torch.randn(len(names), D, dtype=layer.dtype)
    got = (layer if call is None else call)(x, layer.index_of(names))
    torch.testing.assert_close(got, expected(layer, x, names), rtol=1e-4, atol=1e-5)


def memory_of(layer):
    tables = layer.prepared_tables()
    tensors = [t for g in tables.groups for t in (g.positions, *g.matrices)] + [tables.offsets]
    return [t.data_ptr() for t in tensors]


@pytest.mark.parametrize("prepared", [False, True])
def test_numbers_stay_while_others_come_and_go(prepared):
    layer, x = make(4), torch.randn(2, D)
    if prepared:
        layer.prepare()
    index = layer.index_of(["a2", "a3"])
    want = expected(layer, x, ["a2", "a3"])
    layer.delete_adapter("a0")
    torch.testing.assert_close(layer(x, index), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"index: expected -1 or one of \[1, 2, 3\], got 0"):
        layer(x, torch.tensor([2, 0]))
    add(layer, "new", 9)
    assert layer.numbers == {"a1": 1, "a2": 2, "a3": 3, "new": 0}
    torch.testing.assert_close(layer(x, index), want, rtol=1e-4, atol=1e-5)
    assert_serves(layer, ["new", "a3", None, "a1"])
    assert (layer.prepared_tables() is not None) == prepared
    with pytest.raises(ValueError, match=r"index: expected numbers in \[-1, 3\]"):
        layer(x, torch.tensor([2, 4]))


def test_compiled_rows_of_a_number_without_an_adapter_are_nan():
    layer = make(3).prepare()
    layer.delete_adapter("a1")
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    got = run(torch.randn(5, D), torch.tensor([0, 1, 2, 7, -5]))
    assert got.isnan().all(1).tolist() == [False, True, False, True, True]


def test_tables_are_written_in_place_and_graphs_stay():
    layer = make(4, slots=6).prepare()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(layer, backend=counter, fullgraph=True)
    memory = memory_of(layer)
    for i in range(10):
        assert_serves(layer, [None, *list(layer.names)[-3:]], run)
        layer.delete_adapter(layer.names[0])
        add(layer, f"b{i}", 20 + i, n_factors=1 + i % 2, scale=i % 3 > 0)
    assert_serves(layer, ["b9", "b8", "b7", None], run)
    for i in range(2):
        add(layer, f"c{i}", i)
    assert_serves(layer, ["c0", "c1", None, "b9"], run)
    layer.prepare()
    assert_serves(layer, ["c0", "c1", None, "b9"], run)
    assert counter.frame_count == 1
    assert memory_of(layer) == memory
    with pytest.raises(ValueError, match="slots: expected at most 6 adapters, got one more"):
        add(layer, "d", 0)
    assert "d" not in layer.names


def test_without_slots_tables_grow_and_serve_on():
    layer = make(1).prepare()
    for i in range(1, 5):
        add(layer, f"a{i}", i)
    add(layer, "narrow", 6, block_size=4)
    add(layer, "deep", 7, n_factors=3)
    assert layer.prepared_tables() is not None
    assert_serves(layer, ["a4", "narrow", None, "deep", "a0"])
    layer.delete_adapter("narrow")
    assert_serves(layer, ["a4", "deep", "a0"])
    no_scale = make(1, scale=False).prepare()
    assert no_scale.prepared_tables().offsets is None
    add(no_scale, "scaled", 3)
    assert_serves(no_scale, ["a0", "scaled", None])


@pytest.mark.parametrize("rows", [3, 12])
def test_slots_in_half_precision(rows):
    """R - I and scales minus one in bfloat16: half the memory, and an error below that of x."""
    layer = make(5, dtype=torch.bfloat16)
    add(layer, "narrow", 6, block_size=4)
    x = torch.randn(rows, D, dtype=torch.bfloat16)
    names = (2 * [None, *layer.names])[:rows]
    index = layer.index_of(names)
    wide = make(5, dtype=torch.float64)
    add(wide, "narrow", 6, block_size=4)
    with torch.no_grad():
        wide.base.weight.copy_(layer.base.weight)
        wide.base.bias.copy_(layer.base.bias)
    exact = wide(x.double(), index)

    def error(dtype):
        layer.prepare(dtype)
        return float((layer(x, index) - exact).abs().mean()), layer.prepared_tables()

    in_float, whole = error(torch.float32)
    in_half, half = error(torch.bfloat16)
    assert in_half < 2 * in_float
    sizes = [
        sum(m.numel() * m.element_size() for g in t.groups for m in g.matrices)
        + t.offsets.numel() * t.offsets.element_size()
        for t in (whole, half)
    ]
    assert sizes[0] == 2 * sizes[1]
    assert torch.equal(layer(x[:1], torch.tensor([-1])), layer.base(x[:1]))
    with pytest.raises(TypeError, match="dtype"):
        layer.prepare(torch.int8)


def test_a_hundred_adapters_cost_the_operations_of_one():
    """The graph of a prepared call depends neither on the number of adapters nor on their names."""
    counts = []
    for count in (1, 100):
        layer = make(count).prepare()
        counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
        torch.compile(layer, backend=counter, fullgraph=True)(
            torch.randn(4, D), torch.zeros(4, dtype=torch.int64)
        )
        counts.append(counter.op_count)
    assert counts[0] == counts[1]


class Model(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize(
    ("layers", "adapters"), [(4, 8), pytest.param(224, 100, marks=pytest.mark.exhaustive)]
)
def test_a_model_is_compiled_once_for_all_that_come_and_go(layers, adapters, tmp_path):
    """Adapters are loaded from files into prepared layers, between calls of one graph."""
    torch.manual_seed(0)
    model = Model(layers)
    for i in range(2):
        saved = adapt(Model(layers), r"layers\.\d+", block_size=4)
        for name, parameter in saved.named_parameters():
            if name.endswith("skew"):
                nn.init.normal_(parameter, std=0.3)
        save_adapter(saved, tmp_path / f"{i}")
    names = [f"a{i}" for i in range(adapters)]
    load_adapters(model.eval(), {n: tmp_path / "0" for n in names}, slots=adapters)
    parts = [m for m in model.modules() if isinstance(m, MultiAdapterLinear)]
    assert len(parts) == layers
    for part in parts:
        part.prepare()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    run, x = torch.compile(model, backend=counter, fullgraph=True), torch.randn(4, 16)
    with torch.no_grad():
        for i in range(4):
            with adapter_rows(model, [names[-1], None, names[i], names[0]]):
                got = run(x)
                torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
            index = model.layers[0].index_of([names[-1]])
            for part in parts:
                part.delete_adapter(names[i])
            names[i] = f"b{i}"
            load_adapters(model, {names[i]: tmp_path / "1"})
            assert {part.numbers[names[i]] for part in parts} == {i}
            assert torch.equal(model.layers[-1].index_of([names[-1]]), index)
    assert counter.frame_count == 1
    with pytest.raises(ValueError, match=f"at most {adapters} adapters, got 1 beside"):
        load_adapters(model, {"more": tmp_path / "1"})
