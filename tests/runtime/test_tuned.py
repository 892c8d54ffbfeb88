"""Measured choices: where they are looked up, what is believed, what they change."""

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from boft_ops import (
    MultiAdapterLinear,
    boft_linear,
    butterfly_matmul,
    butterfly_matmul_indexed,
    cayley,
    kaleidoscope_matmul,
)
from boft_ops._runtime import backend as backends
from boft_ops._runtime import tuned, tuned_file
from boft_ops._runtime.device import name_of
from boft_ops.ops import rotate_indexed
from boft_ops.ops.planner import plan_for
from boft_ops.ops.rotate import rotate, rotate_rows
from boft_ops.ops.rotated_linear import _triton_launches
from boft_ops.ops.stages import plan

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def row(backend, rows=64, features=64, size=16, **config):
    structure = {"size": size, "chunk": size, "stride": 1}
    sizes = {"rows": rows, "features": features}
    choice = {"op": "rotate", "dtype": "float32", "structure": structure, "sizes": sizes}
    return choice | {"backend": backend, "config": config}


def plan_row(stages, rows=64, features=256, outputs=48):
    butterfly = {"n_factors": 4, "block_size": 8}
    return {
        **{"op": "plan", "dtype": "float32", "structure": butterfly, "backend": ""},
        "sizes": {"rows": rows, "features": features, "outputs": outputs},
        "config": {"stages": stages, "weight_side": 0},
    }


def chosen(rows=64, features=64, size=16):
    """Backend that the table has for a rotation."""
    x, stage = torch.zeros(rows, features), torch.zeros(features // size, size, size)
    choice = tuned.measured(rotate_rows.tunable, x, (x, stage, size, 1, False))
    return None if choice is None else choice.backend


def keep(*rows):
    tuned_file.update(tuned_file.file_of(CPU), CPU, rows, tuned.check_row)
    tuned.forget()


# --- Order ----------------------------------------------------------------------------------------


def test_nothing_measured_is_the_default(tuned_cache):
    assert chosen() is None
    args = torch.zeros(4, 4), torch.zeros(1, 4, 4), 4, 1, False
    assert rotate_rows.choose(args) == rotate_rows.defaults["cpu"]


def test_the_nearest_class_counts_and_a_far_one_does_not(tuned_cache):
    keep(row("reference", rows=64), row("cpu", rows=512))
    assert chosen(rows=100) == "reference"
    assert chosen(rows=400) == "cpu"
    assert chosen(rows=512 * 8, features=128) == "cpu"  # four octaves
    assert chosen(rows=512 * 8, features=256) is None
    assert chosen(size=32) is None  # another structure


def test_contiguous_groups_are_one_class_whatever_their_chunks(tuned_cache):
    """The tuner measures a stage with its chunks; a layer's one call does not know them."""
    x, stage = torch.zeros(64, 64), torch.zeros(4, 16, 16)
    keep(row("reference"))
    classes = {rotate_rows.tunable.shape_class.of(x, stage, c, 1, False) for c in (4, 8, 16)}
    assert len(classes) == 1
    choice = tuned.measured(rotate_rows.tunable, x, (x, stage, 4, 1, False))
    assert choice == tuned.Choice("reference")
    strided = rotate_rows.tunable.shape_class.of(x, stage, 4, 2, False)
    assert strided[0] == (16, 4, 2)


def test_zero_switches_measurements_off(tuned_cache, monkeypatch):
    keep(row("reference"))
    monkeypatch.setenv("BOFT_OPS_AUTOTUNE", "0")
    assert chosen() is None
    monkeypatch.setenv("BOFT_OPS_AUTOTUNE", "yes")
    tuned.forget()
    with pytest.raises(ValueError, match=r"BOFT_OPS_AUTOTUNE: expected 0, 1 or nothing, got 'yes'"):
        chosen()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("BOFT_OPS_AUTOTUNE", "yes", "0, 1 or nothing"),
        ("BOFT_OPS_CACHE", "~nobody-of-this-name/cache", "a folder"),
        ("BOFT_OPS_CACHE", str(Path(__file__) / "cache"), "a folder"),
    ],
)
def test_a_setting_is_understood_or_refused(name, value, expected):
    """Not only where a table is looked at: a forced backend needs none."""
    call = "with boft_ops._runtime.backend.force('reference'): boft_ops.cayley(torch.zeros(2, 6))"
    if name == "BOFT_OPS_CACHE":
        call = "boft_ops.cayley(torch.zeros(2, 6))"
    env = {**os.environ, "BOFT_OPS_AUTOTUNE": "", name: value}
    run = subprocess.run([sys.executable, "-c", f"import torch, boft_ops\n{call}"], cwd=ROOT,
                         env=env, capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last == f"ValueError: {name}: expected {expected}, got {value!r}"


def test_forcing_a_backend_comes_before_all(tuned_cache, monkeypatch):
    keep(row("reference"))
    x, stage = torch.randn(64, 64), torch.randn(4, 16, 16)
    monkeypatch.setattr(rotate_rows, "reference", lambda *args: "reference")
    with torch.no_grad():
        assert rotate_rows(x, stage, 16, 1, False) == "reference"
        with backends.force("cpu"):
            assert isinstance(rotate_rows(x, stage, 16, 1, False), torch.Tensor)


def test_without_measurements_no_class_is_made(tuned_cache, monkeypatch):
    """The price of such a call: a look at the table of the device, which is empty."""
    tunable = rotate_rows.tunable
    unread = tunable.shape_class._replace(of=None)
    x = torch.zeros(4, 4)
    assert tuned.measured(tunable._replace(shape_class=unread), x, (x,)) is None


# --- Files ----------------------------------------------------------------------------------------


def row_instead(faulty):
    return lambda content: json.dumps(content | {"choices": [faulty]})


def plan_of(**config):
    """In the place of a choice for a butterfly of two factors."""
    butterfly = {"n_factors": 2, "block_size": 8}
    return row_instead(plan_row(1) | {"structure": butterfly, "config": config})


BAD = {
    "not JSON": lambda content: "{",
    "not an object": lambda content: "[]",
    "format": lambda content: json.dumps(content | {"format": 99}),
    "device": lambda content: json.dumps(content | {"device": "Another Device"}),
    "versions": lambda content: json.dumps(
        content | {"versions": content["versions"] | {"torch": "1.0"}}
    ),
    "no_such_op": row_instead(row("cpu") | {"op": "no_such_op"}),
    "not a choice": row_instead(row("cpu", rows=-1)),
    "not a choice: no rows": row_instead(row("cpu", rows=0)),
    "not a choice: too large": row_instead(row("cpu", rows=1 << 63)),
    "tiles have no blocks": row_instead(row("triton", blocks=3)),
    "powers of two": row_instead(row("triton", num_warps=3)),
    "no backend of cpu: 'bogus'": row_instead(row("bogus")),
    "no backend of cpu: 'cuda'": row_instead(row("cuda")),
    "not a plan of 2 factors": plan_of(stages=5, weight_side=0),
    "not a plan of 2 factors: W": plan_of(stages=3, weight_side=1),
    "not a plan: side": plan_of(stages=1, weight_side=2),
    "not a plan: levels": plan_of(stages=1, weight_side=0, levels=1),
    "not a plan: no stages": plan_of(weight_side=1),
    "not nested so deep": lambda content: "[" * 100_000,
    "not a table": lambda content: json.dumps({k: content[k] for k in ("format",)}),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_not_to_be_believed_is_ignored_with_one_warning(tuned_cache, fault, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # a CPU's file may then have Triton's tiles
    keep(row("reference"))
    path = tuned_file.file_of(CPU)
    path.write_text(BAD[fault](json.loads(path.read_text())))
    tuned.forget()
    with pytest.warns(RuntimeWarning) as found:
        assert chosen() is None
    assert len(found) == 1
    assert str(path) in str(found[0].message)
    if not fault.startswith("not"):
        assert fault in str(found[0].message)
    assert "is ignored: " in str(found[0].message)
    tuned.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() is None  # warned of once
    keep(row("cpu"))  # replaces it
    assert chosen() == "cpu"


def test_a_layer_runs_beside_an_impossible_plan(tuned_cache):
    """Five stages of two factors."""
    leaves = torch.randn(4, 16), torch.randn(8, 16), torch.randn(2, 2, 28)
    expected = boft_linear(*leaves)
    keep(plan_row(5, 4, 16, 8) | {"structure": {"n_factors": 2, "block_size": 8}})
    with pytest.warns(RuntimeWarning, match=f"{tuned_file.file_of(CPU)} is ignored"):
        torch.testing.assert_close(boft_linear(*leaves), expected)


def test_what_the_interpreter_was_best_at_says_nothing_without_it(tuned_cache, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    keep(row("triton"))
    assert chosen() == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    tuned.forget()
    with pytest.warns(RuntimeWarning, match="is ignored: no backend of cpu"):
        assert chosen() is None


def test_importing_reads_nothing_and_the_first_call_does(tuned_cache):
    path = tuned_file.file_of(CPU)
    path.parent.mkdir(parents=True)
    path.write_text("corrupted")
    code = (
        "import torch, boft_ops; print('imported', flush=True); "
        "boft_ops.cayley(torch.zeros(2, 28)); boft_ops.cayley(torch.zeros(2, 28))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count(str(path)) == 1
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, text=True,
                         capture_output=True)  # fmt: skip
    assert run.stdout == "imported\n"
    assert run.returncode != 0


def test_rows_are_merged_by_class(tuned_cache):
    keep(row("reference"), row("cpu", rows=512))
    keep(row("cpu"))
    path = tuned_file.file_of(CPU)
    rows = tuned_file.read(path, CPU, tuned.check_row)
    assert [(r["sizes"]["rows"], r["backend"]) for r in rows] == [
        (64, "cpu"),
        (512, "cpu"),
    ]
    assert json.loads(path.read_text())["device"] == name_of(CPU)


def _write_many(path, first, count):
    for i in range(first, first + count):
        tuned_file.update(Path(path), CPU, [row("cpu", rows=i)], tuned.check_row)


def test_two_processes_lose_nothing_and_a_reader_sees_whole_files(tuned_cache):
    path, count = tuned_file.file_of(CPU), 40
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=_write_many, args=(str(path), 1 + i * count, count))
        for i in range(2)
    ]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(len(tuned_file.read(path, CPU, tuned.check_row)))  # raises for a half-written one
    assert [writer.exitcode for writer in writers] == [0, 0]
    rows = [r["sizes"]["rows"] for r in tuned_file.read(path, CPU, tuned.check_row)]
    assert sorted(rows) == list(range(1, 1 + 2 * count))
    assert len(seen) > 2
    assert {p.name for p in path.parent.iterdir()} == {path.name, f"{path.name}.lock"}


# --- What a choice changes ------------------------------------------------------------------------


def test_a_backend_is_a_constant_of_one_graph_for_any_rows(tuned_cache):
    stage = cayley(0.1 * torch.randn(4, 120))

    def called():
        """The functions that the graph of a compiled rotation calls, for any number of rows."""
        graphs = []
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: rotate(x, (stage,), plan(1, 16), False),
            backend=lambda graph, _: graphs.append(graph) or graph,
            dynamic=True,
            fullgraph=True,
        )
        with torch.no_grad():
            for n in (50, 33):
                x = torch.randn(n, 64)
                expected = rotate_rows.reference(x, stage, 16, 1, False)
                torch.testing.assert_close(compiled(x), expected)
        (graph,) = graphs
        return {str(node.target) for node in graph.graph.nodes}

    assert any("rotate" in name for name in called())
    keep(row("reference"))
    assert not any("rotate" in name for name in called())


def test_a_gpu_runs_the_measured_set_of_kernels(tuned_cache, monkeypatch):
    """CUDA and Triton kernels are both there; a compiled graph decides when it runs."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the file is a CPU's
    monkeypatch.setattr(rotate_rows, "unavailable", {})
    monkeypatch.setattr(
        rotate_rows, "defaults", {"cpu": tuned.Choice("cuda")}
    )  # the tensors are a CPU's
    monkeypatch.setattr(rotate_rows, "native", lambda: lambda *_: "cuda")
    monkeypatch.setattr(rotate_rows, "launcher", lambda: lambda *_: "triton")
    args = torch.randn(64, 64), torch.randn(4, 16, 16), 16, 1, False
    assert rotate_rows._on_cuda(*args) == "cuda"
    keep(row("triton"))
    assert rotate_rows._on_cuda(*args) == "triton"
    with backends.force("cuda"):
        assert rotate_rows._on_cuda(*args) == "cuda"
    keep(row("reference"))
    torch.testing.assert_close(rotate_rows._on_cuda(*args), rotate_rows.reference(*args))


def test_a_plan_has_the_measured_number_of_stages(tuned_cache):
    x, blocks = torch.randn(5, 256), cayley(0.1 * torch.randn(4, 32, 28))
    before = butterfly_matmul(x, blocks)
    assert len(plan_for(x, 4, 8)) == len(plan(4, 8)) == 1
    keep(plan_row(3))
    stages = plan_for(x, 4, 8)
    assert len(stages) == 3
    assert stages == plan(4, 8, n_stages=3)
    assert plan_for(x.double(), 4, 8) == plan(4, 8)  # another dtype
    torch.testing.assert_close(butterfly_matmul(x, blocks), before)


def test_a_plan_serves_rows_by_their_adapters_and_kaleidoscopes(tuned_cache, monkeypatch):
    right, launches = rotate_indexed.rotate_indexed_rows, []
    monkeypatch.setattr(
        rotate_indexed, "rotate_indexed_rows", lambda *args: launches.append(1) or right(*args)
    )
    layer = MultiAdapterLinear(torch.nn.Linear(256, 48)).eval()
    for name in "ab":
        adapter = layer.add_adapter(name, block_size=8, n_factors=4)
        torch.nn.init.normal_(adapter.skew, std=0.1)
    x, index = torch.randn(16, 256), torch.arange(16) % 3 - 1
    first, second = cayley(0.1 * torch.randn(2, 1, 4, 32, 28))
    calls = [
        lambda: layer(x, index),
        lambda: butterfly_matmul_indexed(x, torch.stack([first[0], second[0]]), index),
        lambda: kaleidoscope_matmul(x, first, second),
    ]

    def results():
        launches.clear()
        with torch.no_grad():
            return [call() for call in calls]

    before = results()
    assert len(launches) == 2
    keep(plan_row(3))
    torch.testing.assert_close(results(), before)
    assert len(launches) == 6
    layer.prepare()  # for any x that comes
    torch.testing.assert_close(results(), before)
    assert len(launches) == 1 + 3


def test_gradients_of_a_layer_are_those_of_any_plan(tuned_cache):
    leaves = [torch.randn(70, 256), 0.1 * torch.randn(4, 32, 28), torch.randn(48)]
    weight = torch.randn(48, 256)

    def gradients():
        x, skew, scale = (t.clone().requires_grad_(True) for t in leaves)
        y = boft_linear(x, weight, skew, scale)
        return torch.autograd.grad(y.square().sum(), (x, skew, scale))

    before = gradients()
    for stages in (2, 4):
        keep(plan_row(stages))
        torch.testing.assert_close(gradients(), before, rtol=1e-4, atol=1e-2)


def test_a_tile_reaches_the_launch(tuned_cache, monkeypatch):
    if not backends.has_triton():
        pytest.skip("triton is not installed")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    from boft_ops.triton_kernels import rotate
    from boft_ops.triton_kernels import rotate_indexed as indexed
    from boft_ops.triton_kernels.limits import H200

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the file is a CPU's
    x, stage = torch.randn(64, 64), cayley(0.1 * torch.randn(4, 120))
    args, index = (x, stage, 16, 1, False), torch.zeros(64, dtype=torch.int32)
    default = rotate.TILES.default({"size": 16, "chunk": 16, "stride": 1}, "float32", H200)
    used = []  # constants and launch options of every launch that is looked up

    def note(module, name):
        build = getattr(module, name)

        def noted(*args):
            launch = build(*args)
            used.append(launch._constants | launch._options)
            return launch if interpreted else lambda *_: None

        monkeypatch.setattr(module, name, noted)

    note(rotate, "_rotate_launch")
    note(indexed, "_indexed_launch")
    rotate_rows.launch(*args)
    assert (used[-1]["BANDS"], used[-1]["num_warps"]) == (default.bands, default.num_warps)
    keep(row("triton", rows=64, bands=2, num_warps=2) | {"structure": {"size": 16, "chunk": 16, "stride": 1}})  # fmt: skip  # noqa: E501
    keep(row("triton", num_warps=2) | {"op": "rotate_indexed"})
    rotate_indexed.rotate_indexed_rows.launch(x, stage[None], index, 16, 1, False)
    assert used[-1]["num_warps"] == 2
    with backends.force("triton"), torch.no_grad():
        forced = rotate_rows(*args) if interpreted else rotate_rows._on_cuda(*args)
    with torch.no_grad():
        chosen = rotate_rows(*args) if interpreted else rotate_rows._on_cuda(*args)
    assert len(used) == 4
    for launch in used[-2:]:
        assert (launch["BANDS"], launch["num_warps"]) == (2, 2)
        assert launch["ROWS"] == default.rows
    if interpreted:
        for y in (forced, chosen):
            torch.testing.assert_close(y, rotate_rows.reference(*args))
    keep(row("cpu"))
    rotate_rows.launch(*args)
    assert used[-1]["BANDS"] == default.bands


def test_a_rotated_layer_launches_the_tiles_of_its_parts(tuned_cache, monkeypatch):
    """rotated_linear has no tile of its own: it launches rotate and the products."""
    if not backends.has_triton():
        pytest.skip("triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the file is a CPU's
    tiles = []

    def rotate(x, *_, tile=()):
        tiles.append(tile)
        return x

    monkeypatch.setattr(rotate_rows, "launcher", lambda: rotate)
    keep(row("triton", num_warps=2))
    forward, _ = _triton_launches()
    forward(
        torch.randn(64, 64), torch.randn(8, 64), torch.randn(4, 16, 16), None, None, True, False
    )
    assert tiles == [(("num_warps", 2),)]


@pytest.mark.parametrize("threads", [1, 3])
def test_results_have_the_same_bits_for_any_number_of_threads(threads):
    leaves = [torch.randn(1200, 96), 0.1 * torch.randn(3, 12, 28), torch.randn(200)]
    weight, grad = torch.randn(200, 96), torch.randn(1200, 200)

    def step():
        x, skew, scale = (t.clone().requires_grad_(True) for t in leaves)
        y = boft_linear(x, weight, skew, scale)
        return [y.detach(), *torch.autograd.grad(y, (x, skew, scale), grad)]

    before, n_threads = step(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert all(map(torch.equal, step(), before))
    finally:
        torch.set_num_threads(n_threads)
