"""The tuner: what it tries, what it believes, how it goes on after an interruption."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from boft_ops._runtime import backend, tuned
from boft_ops._runtime.tuned import Choice
from boft_ops._runtime.workload import Workload
from boft_ops.ops.planner import PLAN, plan_choice
from boft_ops.ops.stages import plan
from boft_ops.triton_kernels.limits import H200
from boft_ops.tune import __main__ as command
from boft_ops.tune import explain, measure, search, workloads
from boft_ops.tune.workloads import MODELS, Shape, shapes_of
from boft_ops.tune.workloads import problems as problems_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).resolve().parents[2]
TINY = ["--shapes=64x48x32", "--butterfly=2x4"]
ROW_OPS = [
    name for name, op in backend.ops().items() if op.tiles() and op.tiles().type.__name__ == "Tile"
]


@pytest.fixture
def out(tmp_path, tuned_cache, monkeypatch):
    monkeypatch.setattr(measure, "_bytes_to_overwrite", lambda device: 1 << 16)
    return tmp_path / "out.json"


def rows_of(path):
    return json.loads(path.read_text())["choices"]


# --- Bytes and flops ------------------------------------------------------------------------------


def test_bytes_and_flops_of_the_input_side():
    """Two stages: x and its gradient pass both, and the first one's input is made again."""
    stages = plan(4, 8, "cpu", 2)
    assert [stage.size for stage in stages] == [16, 16]
    n_bytes, flops = explain.work(1000, 64, 32, stages, 8, 2, False)
    x = 1000 * 64
    compose = 12 * 64 * (16 + 16)  # stages in float32, read and written both ways
    scale = 1000 * 32 * (2 + 3)  # forward and backward
    assert n_bytes == compose + 2 * x * (2 * 2 + 2 + 2 * 3) + 2 * scale  # forward, again, backward
    assert flops == 6 * 8 * 64 * 32 + 2 * x * 16 * 2 + 2 * x * 16 + 4 * x * 16 * 2


def test_bytes_and_flops_of_the_weight_side():
    (stage,) = plan(1, 8)
    n_bytes, flops = explain.work(1000, 64, 32, [stage], 8, 4, True)
    weight, x = 32 * 64, 1000 * 64
    assert n_bytes == 12 * 64 * 8 + 4 * (2 * 2 * weight + 2 * x + 4 * 1000 * 32)
    assert flops == 6 * 8 * 64 * 8 + 2 * 2 * weight * 8 + 2 * x * 8


def test_bytes_and_flops_of_the_weight_side_in_two_stages():
    """W passes both, twice. x and its gradient pass one, and each stage takes a Gram matrix."""
    n_bytes, flops = explain.work(1000, 64, 32, plan(4, 8, "cpu", 2), 8, 2, True)
    weight, x = 32 * 64, 1000 * 64
    rows = (3 + 2 + 2) * x + 4 * 1000 * 32
    assert n_bytes == 12 * 64 * 32 + 2 * (2 * 2 * 2 * weight + rows)
    assert flops == 6 * 8 * 64 * 32 + 2 * 2 * 2 * weight * 16 + (4 + 2 + 2) * x * 16


# --- Tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROW_OPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [6, 16, 32, 64, 128])
def test_tiles_are_legal(name, dtype, size):
    structure = {"size": size, "chunk": size, "stride": 1}
    found = [
        dict(choice.config) for choice in workloads.tiles(backend.ops()[name], structure, dtype, -1)
    ]
    if name == "rotate_backward" and not found:
        assert size > 64  # its groups are too large for one kernel
        return
    assert found
    assert len(found) <= 100
    for tile in found:
        free = ("num_stages", "programs")
        assert all(value & (value - 1) == 0 for key, value in tile.items() if key not in free)
        assert tile["bands"] == 1 or tile["bands"] >= tile["num_warps"]
        packs = tile["bands"] == 1 and tile["columns"] >= 2 * size
        if packs or tile["bands"] > 1:
            assert tile["columns"] == tile["inner"] >= size
        assert not packs or (dtype == "bfloat16" and size <= 32)
        assert size > 16 or packs or tile["bands"] > 1
        if name == "rotate_backward" or (dtype == "bfloat16" and name == "rotate"):
            assert tile["inner"] >= size


@pytest.mark.parametrize(("name", "size"), [("rotate", 32), ("rotate_backward", 16)])
def test_bands_of_sixteen_are_tried_for_chunks_that_lie_apart(name, size):
    structure = {"size": size, "chunk": 4, "stride": 8}
    found = workloads.tiles(backend.ops()[name], structure, "bfloat16", -1)
    assert {8, 16} <= {dict(choice.config)["bands"] for choice in found}


def test_more_and_fewer_programs_are_tried():
    structure = {"size": 16, "chunk": 16, "stride": 1}
    found = workloads.tiles(backend.ops()["rotate"], structure, "bfloat16", -1)
    assert {3, 6, 12} <= {dict(choice.config)["programs"] for choice in found}
    found = workloads.tiles(backend.ops()["rotate_backward"], structure, "bfloat16", -1)
    assert {dict(choice.config)["programs"] for choice in found} == {0}  # the caller gives splits


def test_several_groups_in_a_program_are_tried():
    structure = {"n_factors": 2, "block_size": 8}
    found = workloads.tiles(backend.ops()["stage_from_skew"], structure, "float32", -1)
    assert {"B": 8, "G": 4, "C": 8, "num_warps": 1} in [dict(choice.config) for choice in found]


# (bands, rows, columns, inner, num_warps, num_stages) of the fastest seen on an H200, 8192 x 4096
FASTEST = [
    ("rotate", 16, (1, 64, 64, 64, 4, 3)),
    ("rotate_backward", 16, (1, 64, 64, 64, 8, 3)),
    ("rotate", 64, (1, 128, 64, 64, 8, 3)),
    ("rotate_backward", 64, (1, 128, 64, 64, 8, 3)),
    ("rotate", 128, (1, 128, 128, 128, 4, 3)),
    ("rotate_backward", 128, (1, 64, 128, 128, 8, 3)),
    ("rotate", 256, (1, 64, 256, 256, 8, 3)),
]


@pytest.mark.parametrize(("name", "size", "tile"), FASTEST)
def test_what_was_fastest_is_tried(name, size, tile):
    structure = {"size": size, "chunk": size, "stride": 1}
    op = backend.ops()[name]
    default = op.tiles().default(structure, "bfloat16", H200)
    found = [
        tuple(dict(one.config).values()) for one in workloads.tiles(op, structure, "bfloat16", -1)
    ]
    assert tile in [one[: len(tile)] for one in (default, *found)]


@pytest.mark.parametrize("name", ["cayley", "cayley_backward"])
def test_many_blocks_in_one_warp_are_tried(name):
    found = workloads.tiles(backend.ops()[name], {"block_size": 8}, "float32", -1)
    configs = [dict(choice.config) for choice in found]
    groups = {config["G"] for config in configs if config["num_warps"] == 1}
    assert {32, 64} <= groups


def test_an_op_without_a_tile_has_no_tiles_to_try():
    op = backend.ops()["compose"]
    assert workloads.tiles(op, {"n_factors": 2, "block_size": 8}, "float32", -1) == []


COMPILE_AHEAD = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Nothing:  # a driver of a GPU that is not there
    get_current_device = get_current_stream = lambda self, *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(Nothing())
import dataclasses
from boft_ops._runtime.tuned import Choice
from boft_ops.tune import search
from boft_ops.tune.workloads import Shape, problems
cpu = torch.device("cpu")
(problem,) = problems([Shape(64, 64, 32)], [(2, 8)], torch.bfloat16, cpu, ["rotate"])
from boft_ops.tune.workloads import tiles
from boft_ops._runtime.backend import ops
structure = problem.key["structure"]
found = tiles(ops()["rotate"], structure, "bfloat16", -1)
# no power of two: does not compile
choices = Choice("triton"), *found[:3], Choice("triton", (("rows", 3),))
problem = dataclasses.replace(problem, others=choices)
with torch.no_grad():
    search._compile_ahead(problem, problem.args(0))
from boft_ops.triton_kernels.rotate import rotate_kernel
print(len(rotate_kernel.device_caches[0][0]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not backend.has_triton(), reason="triton is not installed")
def test_candidates_are_compiled_at_once_and_none_is_launched(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE_AHEAD], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout == "4\n"  # the default tile and three others; one failed


COMPILE = """
import json, triton_resources
from triton_cases import rotate_case
from boft_ops._runtime.backend import ops
from boft_ops.tune.workloads import tiles
from boft_ops.triton_kernels.config_rotate import Tile
for name, size, dtype in (("rotate", 16, "bfloat16"), ("rotate", 64, "bfloat16"),
                          ("rotate_backward", 64, "bfloat16"),
                          ("rotate_stage_grad", 32, "float32")):
    structure = {"size": size, "chunk": size, "stride": 1}
    tile = Tile(**dict(tiles(ops()[name], structure, dtype, -1)[0].config))
    case = rotate_case(name, tile, structure | {"dtype": dtype})
    print(json.dumps([name, size, dtype, triton_resources.compiled("sm_90", case)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not backend.has_triton(), reason="triton is not installed")
def test_the_nearest_tiles_compile_for_a_gpu_that_is_not_there(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    helpers = ROOT / "tests" / "helpers"
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{helpers}"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == 4
    for *what, used in found:
        assert used["stack"] == 0, (what, used)
        assert used["shared"] <= H200.program_shared, (what, used)


# --- The search -----------------------------------------------------------------------------------


TIMES = {"default": 1.0, "slow": 2.0, "fast": 0.8, "noise": 0.985}


class World:
    """A problem of candidates whose times are known, and a clock that knows them."""

    def __init__(self, *names):
        tunable = PLAN._replace(name="world")
        self.problem = workloads.Problem(
            tunable=tunable,
            workload=Workload(8, 8, 8, 1, 8),
            args=lambda seed: (torch.ones(3),),
            run=self.run,
            comparable=lambda result: result,
            default=Choice("default"),
            others=tuple(map(Choice, names)),
            key={"op": "world", "dtype": "float32", "structure": {}, "sizes": {}},
        )

    def run(self, x):
        choice = tuned.lookup(self.problem.tunable, CPU, x.dtype, (), ())
        self.last = "default" if choice is None else choice.backend
        if self.last == "broken":
            raise RuntimeError("does not compile")
        return x * (3.001 if self.last == "wrong" else 3.0)

    def timer(self, run):
        run()
        assert self.last not in ("wrong", "broken"), "timed though it fails"
        return TIMES[self.last]

    def tune(self, **changes):
        timer = type("Timer", (), {"__call__": lambda _, run: self.timer(run)})()
        return search.tune(dataclasses.replace(self.problem, **changes), timer)


def test_the_fastest_right_candidate_is_chosen():
    row = World("wrong", "slow", "broken", "fast").tune()
    assert (row["backend"], row["us"], row["default_us"]) == ("fast", 0.8e6, 1e6)
    assert row["tried"] == 5
    assert [f["backend"] for f in row["failed"]] == ["wrong", "broken"]
    assert "relative error 0.00033" in row["failed"][0]["why"]
    assert "does not compile" in row["failed"][1]["why"]


def test_noise_does_not_replace_the_default():
    row = World("noise", "slow").tune()
    assert (row["backend"], row["us"]) == ("default", row["default_us"])
    assert not measure.is_faster([0.9, 0.9, 1.1, 1.1], [1.0] * 4)
    assert measure.is_faster([0.9, 0.9, 0.9, 1.1], [1.0] * 4)


def test_luck_does_not_replace_the_default():
    """One of several candidates has a good day; it is gone when the two are timed again."""
    world, asked = World("fast"), []

    def timer(run):
        seconds = world.timer(run)
        asked.append(world.last)
        return seconds if asked.count("fast") <= search.FIRST + search.ROUNDS else 1.0

    row = search.tune(world.problem, timer)
    assert (row["backend"], row["us"]) == ("default", row["default_us"])
    assert asked.count("fast") == search.FIRST + 2 * search.ROUNDS


def test_equals_leave_the_default_alone(out):
    """By the clock: four candidates that do exactly what the default does."""
    world = World("one", "two", "three", "four")
    problem = dataclasses.replace(world.problem, args=lambda seed: (torch.ones(1 << 15),))
    row = search.tune(problem, measure.Timer(CPU), rounds=101)
    assert (row["backend"], row["tried"], row["failed"]) == ("default", 5, [])
    assert row["us"] == row["default_us"]


@pytest.fixture
def one_thread():
    """Two would wait for each other, and for other processes' threads, longer than they work."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def test_a_bad_default_is_replaced(out, one_thread, monkeypatch):
    """By the clock: five passes over x where one would do, some three times as slow."""
    monkeypatch.setattr(workloads, "default_plan", lambda m, *_: plan_choice(m, False))
    arguments = ["--shapes=128x16x1000", "--butterfly=5x4", f"--out={out}", "--ops=plan"]
    assert command.main(arguments) == 0
    (row,) = rows_of(out)
    assert row["config"]["stages"] < 5
    assert row["us"] < 0.8 * row["default_us"]


def test_a_default_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="the default itself fails: output 0: relative error"):
        World().tune(default=Choice("wrong"))


def test_turns_change_and_inputs_rotate(monkeypatch):
    log = []
    runs = [lambda n, name=name: log.append((name, n)) for name in "abc"]
    assert measure.take_turns(lambda run: run() or 1.0, runs, 2) == [[1.0, 1.0]] * 3
    assert log == [("a", 0), ("b", 0), ("c", 0), ("b", 1), ("c", 1), ("a", 1)]
    monkeypatch.setattr(search, "MEMORY", 3 * 1024)
    problem = dataclasses.replace(
        World().problem, args=lambda seed: (torch.full((256,), float(seed)), None)
    )
    assert [int(s[0][0]) for s in search._sets_of(problem)] == [0, 1, 2]


def test_the_timer_overwrites_the_cache_before_each_call(out):
    timer = measure.Timer(CPU)
    timer._flush.fill_(7)
    assert timer(lambda: None) >= 0
    assert int(timer._flush.abs().max()) == 0


class Event:
    """An event of a device whose clock is ``now``, in milliseconds."""

    now = 0.0

    def record(self):
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


def test_a_gpu_waits_while_the_host_prepares_a_call(monkeypatch, out):
    """Without it, the events around a call would tell how long the host took."""
    waits, took, host = [], 2.0, iter(range(1000))

    def sleep(cycles):
        waits.append(cycles)
        Event.now += cycles / 2e6

    def run():
        Event.now += took

    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    # each reading of the host's clock is 1 ms later, much longer than the device waits at first
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(host) / 1e3)
    timer = measure.Timer(CPU)
    timer.device, timer._events = torch.device("cuda"), [Event(), Event(), Event()]
    timer._cycles = measure.CYCLES
    assert timer(run) == pytest.approx(took / 1e3)
    assert waits == [measure.CYCLES << i for i in range(4)]  # 0.13, 0.26, 0.52, 1.05 ms
    assert timer(run) == pytest.approx(took / 1e3)
    assert waits[4:] == [measure.CYCLES << 3]


@pytest.mark.exhaustive
def test_tiles_are_tried_in_the_interpreter(monkeypatch, out):
    """The code that tunes Triton kernels, but for the clock."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the gpu tests do it on the device")
    monkeypatch.setattr(workloads, "STAGES", (1,))
    monkeypatch.setitem(backend.PREFERENCE, "cpu", ("cpu", "triton"))
    found = problems_of([Shape(32, 16, 20)], [(2, 8)], torch.float32, CPU)
    tried = {}
    for problem in found:
        tiles = [c for c in problem.others if c.backend == "triton" and c.config][:2]
        if tiles:
            others = Choice("triton"), *tiles
            one = dataclasses.replace(problem, others=others)
            tried[problem.tunable.name] = search.tune(one, measure.Timer(CPU), rounds=1)
    assert {*ROW_OPS, "scale", "scale_backward"} <= tried.keys()
    for row in tried.values():
        assert (row["failed"], row["tried"]) == ([], 4), row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tiles_are_tried_on_a_gpu(tuned_cache, out):
    arguments = ["--device=cuda", "--shapes=1024x1024x2048", "--butterfly=2x8", f"--out={out}"]
    assert command.main([*arguments, "--ops", "rotate", "rotate_backward"]) == 0
    assert {row["op"] for row in rows_of(out)} == {"rotate", "rotate_backward"}
    assert all(row["us"] <= row["default_us"] and row["tried"] > 4 for row in rows_of(out))


# --- The command ----------------------------------------------------------------------------------


def test_all_of_a_shape(out, capsys):
    assert command.main([*TINY, f"--out={out}"]) == 0
    rows = rows_of(out)
    measured = {row["op"] for row in rows}
    assert {"plan", "scale", "scale_backward", *ROW_OPS} <= measured
    assert measured <= tuned.tunables.keys()
    assert all(row["us"] <= row["default_us"] for row in rows)
    assert all(row["failed"] == [] for row in rows)
    assert "x the default" in capsys.readouterr().out


def test_every_operator_with_a_class_is_measured_at_some_shape():
    shapes = [Shape(64, 48, 100)]
    found = problems_of(shapes, [(2, 4), (1, 16), (5, 4)], torch.float32, CPU)
    missing = tuned.tunables.keys() - {problem.tunable.name for problem in found}
    assert missing == set()


def test_an_interrupted_run_goes_on(out, monkeypatch, capsys):
    real, asked = search.tune, []

    def tune(problem, *rest):
        asked.append(problem.tunable.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(problem, *rest)

    monkeypatch.setattr(command, "tune", tune)
    arguments = [*TINY, f"--out={out}", "--ops", "rotate", "rotate_stage_grad", "scale_backward"]
    assert command.main(arguments) == 130
    assert [row["op"] for row in rows_of(out)] == asked[:1]
    assert command.main(arguments) == 0
    assert asked == ["rotate", "rotate_stage_grad", "rotate_stage_grad", "scale_backward"]
    assert f"2 of 3 to measure, into {out}" in capsys.readouterr().out
    assert {row["op"] for row in rows_of(out)} == {"rotate", "rotate_stage_grad", "scale_backward"}


def test_a_butterfly_takes_part_where_it_fits():
    shapes = [Shape(48, 16, 20), Shape(64, 16, 20)]
    found = problems_of(shapes, [(3, 8), (4, 8)], torch.float32, CPU, ["plan"])
    # 6 blocks are no multiple of 4, nor of 8
    assert [(p.key["structure"]["n_factors"], p.key["sizes"]["features"]) for p in found] == [
        (3, 64),
        (4, 64),
    ]


def test_a_deadline_leaves_the_rest_for_the_next_time(out, capsys, monkeypatch):
    real, clock = search.tune, iter(range(1000))
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(clock))  # a second a reading
    monkeypatch.setattr(command, "tune", lambda problem, _: real(problem, lambda run: 1.0))
    assert command.main([*TINY, f"--out={out}", "--seconds=2", "--ops", *ROW_OPS]) == 0
    assert len(rows_of(out)) == 2
    assert "2 measured in 4 s, 3 left for the next time" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_explain_marks_the_default(device, capsys, tuned_cache):
    explain.show(8192, 4096, 4096, 10, 8, torch.bfloat16, torch.device(device))
    title, header, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith(f"BOFT(10, 8), 4096 -> 4096, 8192 rows, bfloat16 on {device}")
    assert header.split()[:3] == ["stages", "sizes", "side"]
    assert len(lines) == 2 * 10
    (default,) = [line for line in lines if line.endswith("default, chosen")]
    assert int(default.split()[0]) == len(plan(10, 8, device))
    assert lines[10].split()[:3] == ["1", "4096", "weight"]


def test_explain_marks_what_was_measured_best(capsys, tuned_cache):
    with tuned.pinned(plan=plan_choice(3, False)):
        explain.show(64, 256, 64, 4, 8, torch.float32, CPU)
    lines = capsys.readouterr().out.splitlines()[2:]
    marked = [i for i, line in enumerate(lines) if line.endswith("measured best, chosen")]
    assert (marked, len(lines)) == ([2], 8)


def test_shapes():
    found = shapes_of("dinov2-large,12x34x56", 100)
    assert found == [*((d, n, 100) for d, n in MODELS["dinov2-large"]), (12, 34, 56)]
    for bad in ("llama", "1x2", "0x1x1", "axbxc", "1x2x3x4", "1x2x-3", ""):
        with pytest.raises(ValueError, match=f"shapes: expected .* got '{bad}'"):
            shapes_of(f"1x1x1,{bad}", 1)


WRONG = {  # arguments -> the end of the one line that says what is wrong with them
    "--explain 100 100 10": "block_size: expected a divisor of 100 features, got 8. Nearest",
    "--explain 64 -5 -3": "argument --explain: expected a positive whole number, got '-5'",
    "--explain 64 64 64 --butterfly 0x8": "argument --butterfly: expected e.g. 2x8,4x8, got '0x8'",
    "--butterfly 2x8x3": "argument --butterfly: expected e.g. 2x8,4x8, got '2x8x3'",
    "--butterfly two": "argument --butterfly: expected e.g. 2x8,4x8, got 'two'",
    "--butterfly 2x7": "--butterfly: none of [(2, 7)] fits any of --shapes",
    "--device bogus": "argument --device: invalid choice: 'bogus'",
    "--device cuda:99": "argument --device: invalid choice: 'cuda:99'",
    "--dtype int8": "argument --dtype: invalid choice: 'int8'",
    "--rows -5": "argument --rows: expected a positive whole number, got '-5'",
    "--rows 0": "argument --rows: expected a positive whole number, got '0'",
    "--seconds 0": "argument --seconds: expected a positive whole number, got '0'",
    "--seconds soon": "argument --seconds: expected a positive whole number, got 'soon'",
    "--out .": "--out: expected a file in a folder to write to, got '.'",
    "--out mine.json/out.json": "--out: expected a file in a folder to write to, got 'mine.json",
    "--shapes llama": "or DxNxROWS, got 'llama'",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments_are_said_before_any_work(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(command, "tune", lambda *_: pytest.fail("measures"))
    Path("mine.json").write_text("5")
    with pytest.raises(SystemExit) as ended:
        command.main(arguments.split())
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert WRONG[arguments] in line
    assert os.listdir(tmp_path) == ["mine.json"]


def test_a_forced_backend_leaves_nothing_to_measure(out, capsys):
    with backend.force("reference"), pytest.raises(SystemExit):
        command.main([*TINY, f"--out={out}"])
    assert "BOFT_OPS_BACKEND: expected none, as all are to be tried" in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(SystemExit):
        command.main([*TINY, f"--out={tmp_path / 'out.json'}"])
    assert "--out: expected a file in a folder to write to, got" in capsys.readouterr().err


def test_no_gpu_is_said(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        command.main(["--device=cuda"])
    assert "--device cuda: torch sees no GPU" in capsys.readouterr().err
