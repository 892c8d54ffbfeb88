"""The tuner: what it tries, what it believes, how it goes on after an interruption."""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_resources

from boft_ops._runtime import backend, tuned_file
from boft_ops._runtime import native as native_library
from boft_ops._runtime.tuned_table import Choice
from boft_ops.ops.stages import plan
from boft_ops.tune import __main__ as command
from boft_ops.tune import explain, measure, problems, search, space
from boft_ops.tune import machine as machine_
from boft_ops.tune.cost import Resources, cost, plans, seconds
from boft_ops.tune.machine import data_sheet
from boft_ops.tune.makers import Shape
from boft_ops.tune.makers import problems as problems_of
from boft_ops.tune.shapes import NAMED, shapes_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).resolve().parents[2]
TINY = ["--shapes=64x48x32", "--butterfly=2x4"]
STAGE = {"size": 16, "chunk": 16, "stride": 1}
ROWS = {"rows": 8192, "features": 4096}


@pytest.fixture
def out(tmp_path, tuned_cache, monkeypatch):
    monkeypatch.setattr(machine_, "_last_level_cache", lambda: 1 << 16)
    monkeypatch.setattr(search, "SECONDS", 0.01)
    return tmp_path / "out.json"


def rows_of(path):
    return json.loads(path.read_text())["choices"]


# --- The cost model -------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "b"), [(2, 8), (4, 4), (6, 8), (10, 8), (12, 2)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_default_plan_has_the_cheapest_forward_passes(m, b, device):
    """The rates of the data sheets and ``plan.PASS_COST`` are the same model."""
    dtype = {"cpu": "float32", "cuda": "bfloat16"}[device]
    machine = data_sheet(torch.device(device))._replace(launch=0.0)
    found = plans(1 << 20, 1 << 16, 4096, m, b, dtype, machine, device)
    # where both bytes and flops were paid in full: the default's rule adds them
    rule = [
        sum(
            4 * s.size / machine.rate(dtype) * 0.5
            + 2 * {"cpu": 4, "cuda": 2}[device] / machine.bytes
            for s in c.stages
        )
        for c in found[:-1]
    ]
    assert len(plan(m, b, device)) == 1 + rule.index(min(rule))


def test_costs_are_bytes_or_flops():
    machine = data_sheet(CUDA)._replace(bytes=1e9, flops={"bfloat16": 1e12, "float32": 1e12})
    machine = machine._replace(launch=0.0)
    stages = plan(2, 8, "cuda")
    few = cost(1000, 4096, 64, stages, 8, "bfloat16", machine)
    assert few.forward == 2 * 1000 * 4096 * 2 / 1e9
    assert few.backward == 3 * 1000 * 4096 * 2 / 1e9
    slow = machine._replace(flops={"bfloat16": 1e9, "float32": 1e9})
    assert cost(1000, 4096, 64, stages, 8, "bfloat16", slow).forward == 2 * 1000 * 4096 * 16 / 1e9
    weight = cost(1000, 4096, 64, stages, 8, "bfloat16", machine, "weight")
    assert weight.forward == 2 * 64 * 4096 * 2 / 1e9  # rows of W, not of x


def test_what_does_not_fit_takes_forever():
    machine = data_sheet(CUDA)
    fits = Resources(shared=64 << 10, registers=128, loaded=32 << 10, warps=4)
    one = seconds(fits, 10_000, 1e9, 1e9, "bfloat16", machine)
    assert 0 < one < math.inf
    assert (
        seconds(fits._replace(shared=300 << 10), 10_000, 1e9, 1e9, "bfloat16", machine) == math.inf
    )
    assert seconds(fits._replace(registers=300), 10_000, 1e9, 1e9, "bfloat16", machine) == math.inf
    # fewer bytes under way than keep the memory busy
    assert seconds(fits._replace(loaded=1 << 10), 10_000, 1e9, 1e9, "bfloat16", machine) > 2 * one
    # one wave and a little of another
    alone = 132 * 3
    full = seconds(fits, alone, 1e9, 1e9, "bfloat16", machine)
    assert seconds(fits, alone + 1, 1e9, 1e9, "bfloat16", machine) > 1.5 * full


def test_pruning_keeps_the_best_few_within_a_factor():
    modelled = [(1.0, "best"), (2.9, "near"), (3.1, "far"), (math.inf, "never")]
    assert problems.pruned(modelled) == ["best", "near"]
    assert len(problems.pruned([(1.0, i) for i in range(100)])) == problems.MOST
    assert problems.pruned([(math.inf, "never")]) == []
    assert problems.pruned([]) == []


@pytest.mark.parametrize("op", space.OF_ROWS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [6, 16, 32, 64, 128])
def test_tiles_are_legal(op, dtype, size):
    structure = {"size": size, "chunk": size, "stride": 1}
    default = space.default_of(op, structure, dtype)
    found = problems.pruned(space.tiles(op, structure, ROWS, dtype, data_sheet(CUDA)))
    if default is None:
        assert found == []
        return
    assert found
    for tile in found:
        assert all(value & (value - 1) == 0 for name, value in tile.items() if name != "num_stages")
        assert tile["bands"] == 1 or tile["bands"] >= tile["num_warps"]
        packs = tile["bands"] == 1 and tile["columns"] >= 2 * size
        if packs or tile["bands"] > 1:
            assert tile["columns"] == tile["inner"] >= size
        assert not packs or (dtype == "bfloat16" and size <= 32)
        assert size > 16 or packs or tile["bands"] > 1
        if op == "rotate_backward" or (dtype == "bfloat16" and op == "rotate"):
            assert tile["inner"] >= size


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


@pytest.mark.parametrize(("op", "size", "tile"), FASTEST)
def test_what_was_fastest_is_tried(op, size, tile):
    structure = {"size": size, "chunk": size, "stride": 1}
    default = space.default_of(op, structure, "bfloat16")
    found = problems.pruned(space.tiles(op, structure, ROWS, "bfloat16", data_sheet(CUDA)))
    assert tile in [tuple(candidate.values()) for candidate in (default, *found)]


@pytest.mark.parametrize("op", ["cayley", "cayley_backward"])
def test_many_blocks_in_one_warp_are_tried(op):
    found = problems.pruned(space.tiles(op, {"block_size": 8}, {}, "float32", data_sheet(CUDA)))
    tiles = (space.default_of(op, {"block_size": 8}, "float32"), *found)
    assert {8, 16, 32, 64} <= {tile["G"] for tile in tiles if tile["num_warps"] == 1}


COMPILE = """
import json, sys, torch
import triton_resources
from boft_ops.tune import problems, space
from boft_ops.tune.machine import data_sheet
from boft_ops.triton_kernels import config_rotate
structures = {"rows": 8192, "features": 4096}
for op, size, dtype in (("rotate", 16, "bfloat16"), ("rotate", 64, "bfloat16"),
                        ("rotate_backward", 64, "bfloat16"), ("gram", 32, "float32")):
    structure = {"size": size, "chunk": size, "stride": 1}
    tiles = space.tiles(op, structure, structures, dtype, data_sheet(torch.device("cuda")))
    tile = config_rotate.Tile(**problems.pruned(tiles)[0])
    case = config_rotate._case(op, tile, structure | {"dtype": dtype})
    print(json.dumps([op, size, dtype, triton_resources.compiled("sm_90", case)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not backend.has_triton(), reason="triton is not installed")
def test_the_model_s_best_tiles_compile_for_a_gpu_that_is_not_there(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == 4
    for *what, used in found:
        assert used["stack"] == 0, (what, used)
        assert used["shared"] <= triton_resources.TARGETS["sm_90"][1], (what, used)


COMPILE_AHEAD = """
import time, torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Nothing:  # a driver of a GPU that is not there
    get_current_device = get_current_stream = lambda self, *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(Nothing())
from boft_ops._runtime.tuned_table import Choice
from boft_ops.tune import problems
from boft_ops.tune.compile import compile_ahead
from boft_ops.tune.machine import data_sheet
from boft_ops.tune.makers import Shape, problems as problems_of
problems.MOST = 3
machine = data_sheet(torch.device("cuda"))
cpu = torch.device("cpu")
(problem,) = problems_of([Shape(64, 64, 32)], [(2, 8)], torch.bfloat16, cpu, machine, ["rotate"])
args = problem.make(0)
choices = [c for c in problem.candidates(args, machine, ["triton"]) if c.backend == "triton"]
choices.append(Choice((), "triton", {"rows": 3}))  # no power of two: does not compile
with torch.no_grad():
    compile_ahead(problem, choices, args)
from boft_ops.triton_kernels.rotate import rotate_kernel
print(len(choices), len(rotate_kernel.device_caches[0][0]))
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
    assert run.stdout == "5 4\n"  # the default tile, three others, and one that failed


# --- The search -----------------------------------------------------------------------------------


TIMES = {"default": 1.0, "slow": 2.0, "fast": 0.8, "noise": 0.985}


class World:
    """A problem of candidates whose times are known, and a clock that knows them."""

    def __init__(self, *names):
        self.now, self.names = None, names
        world = self

        class Known(problems.Problem):
            def candidates(self, args, machine, backends=None):
                return [Choice((), name, {}) for name in ("default", *world.names)]

            @contextlib.contextmanager
            def apply(self, choice):
                before, world.now = world.now, choice.backend
                yield
                world.now = before

        self.problem = Known("op", "float32", {}, {}, CPU, lambda seed: (torch.ones(3),), self.run)

        self.problem.default = lambda args: Choice((), "default", {})

    def run(self, x):
        if self.now == "broken":
            raise RuntimeError("does not compile")
        self.last = self.now
        return x * (3.001 if self.now == "wrong" else 3.0)

    def timer(self, run):
        run()
        assert self.last not in ("wrong", "broken"), "timed though it fails"
        return TIMES[self.last]

    def tune(self):
        timer = type("Timer", (), {"device": CPU, "__call__": lambda _, run: self.timer(run)})()
        return search.tune(self.problem, data_sheet(CPU), timer)


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


def test_luck_does_not_replace_the_default(monkeypatch):
    """Of several candidates one has a good day; it is gone when the two are timed again."""
    monkeypatch.setattr(search, "SECONDS", 0.0)
    world, asked = World("fast"), []

    def timer(run):
        seconds = world.timer(run)
        asked.append(world.last)
        return seconds if asked.count("fast") <= search.FIRST + search.ROUNDS else 1.0

    kind = type("Timer", (), {"device": CPU, "__call__": lambda _, run: timer(run)})
    row = search.tune(world.problem, data_sheet(CPU), kind())
    assert (row["backend"], row["us"]) == ("default", row["default_us"])
    assert asked.count("fast") == search.FIRST + 2 * search.ROUNDS


def test_equals_leave_the_default_alone():
    """By the clock: four candidates that do exactly what the default does."""
    world = World("one", "two", "three", "four")
    world.problem.make = lambda seed: (torch.ones(1 << 15),)
    timer = measure.Timer(CPU, data_sheet(CPU)._replace(cache=1024))
    row = search.tune(world.problem, data_sheet(CPU), timer, rounds=search.MOST_ROUNDS)
    assert (row["backend"], row["tried"], row["failed"]) == ("default", 5, [])
    assert row["us"] == row["default_us"]


@pytest.fixture
def one_thread():
    """Two would wait for each other, and for other processes' threads, longer than they work."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def test_a_bad_default_is_replaced_and_that_is_verified(out, one_thread, monkeypatch, capsys):
    """By the clock: five passes over x where one would do, some three times as slow."""
    bad = lambda m, b, device, rows, outputs: (plan(m, b, device, m), False)  # noqa: E731
    monkeypatch.setattr(problems, "default_plan", bad)
    arguments = ["--shapes=128x16x1000", "--butterfly=5x4", f"--out={out}", "--ops=plan"]
    assert command.main(arguments) == 0
    (row,) = [row for row in rows_of(out) if row["structure"]["n_factors"] == 5]
    assert row["config"]["stages"] < 5
    assert row["us"] < 0.8 * row["default_us"]
    capsys.readouterr()
    assert command.main([*arguments, "--verify"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "n_factors=5" in line]
    assert line.endswith("faster")
    assert float(line.split("float32: ")[1].split()[0]) < 0.9


def test_a_default_that_fails_is_an_error():
    world = World()
    world.problem.candidates = lambda *_: [Choice((), "wrong", {})]
    with pytest.raises(RuntimeError, match="the default itself fails: output 0: relative error"):
        world.tune()


@pytest.mark.parametrize("message", ["CUDA error: an illegal memory access", "HIP error: x"])
def test_a_lost_device_ends_the_search(message):
    world = World("broken")
    world.run = None

    def run(x):
        if world.now == "broken":
            raise RuntimeError(message)
        return x

    world.problem.run = run
    with pytest.raises(search.DeviceError, match=message):
        world.tune()


def test_turns_change_and_inputs_rotate():
    log, timer = [], type("Timer", (), {"device": CPU})
    timer.__call__ = lambda self, run: run() or 1.0
    runs = [lambda n, name=name: log.append((name, n)) for name in "abc"]
    assert measure.take_turns(timer(), runs, 2) == [[1.0, 1.0]] * 3
    assert log == [("a", 0), ("b", 0), ("c", 0), ("b", 1), ("c", 1), ("a", 1)]
    sets = measure.sets_of(lambda seed: (torch.full((256,), seed), None), 3 * 2048)
    assert [int(s[0][0]) for s in sets] == [0, 1, 2]


def test_the_timer_overwrites_the_cache_before_each_call():
    timer = measure.Timer(CPU, data_sheet(CPU)._replace(cache=1024))
    timer._flush.fill_(7)
    assert timer(lambda: None) >= 0
    assert int(timer._flush.abs().max()) == 0


class Event:
    """Of a device whose clock is in ``now``, in milliseconds."""

    now = 0.0

    def record(self):
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


def test_a_gpu_waits_while_the_host_prepares_a_call(monkeypatch):
    """Else the events around a call would tell how long the host took."""
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
    timer = measure.Timer(CPU, data_sheet(CPU)._replace(cache=1024))
    timer.device, timer._events = torch.device("cuda"), [Event(), Event(), Event()]
    timer._cycles = measure.CYCLES
    assert timer(run) == pytest.approx(took / 1e3)
    assert waits == [measure.CYCLES << i for i in range(4)]  # 0.13, 0.26, 0.52, 1.05 ms
    assert timer(run) == pytest.approx(took / 1e3)
    assert waits[4:] == [measure.CYCLES << 3]


def test_tiles_are_tried_in_the_interpreter(monkeypatch):
    """The code that tunes Triton kernels, but for the clock."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the gpu tests do it on the device")
    monkeypatch.setattr(problems, "MOST", 2)
    machine = data_sheet(CPU)._replace(shared=227 << 10, cache=1024)
    found = problems_of([Shape(32, 16, 20)], [(2, 8)], torch.float32, CPU, machine)
    for problem in found:
        if problem.op in (*space.OF_ROWS, "stage_from_skew", "scale_backward"):
            row = search.tune(problem, machine, measure.Timer(CPU, machine), ["triton"], rounds=1)
            assert row["failed"] == [], problem
            assert row["tried"] == 1 + 1 + 2, problem  # default, default tile, two tiles


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tiles_are_tried_on_a_gpu(tuned_cache, out):
    arguments = ["--device=cuda", "--shapes=1024x1024x2048", "--butterfly=2x8", f"--out={out}"]
    assert command.main([*arguments, "--ops", "rotate", "rotate_backward", "stage_from_skew"]) == 0
    assert {row["op"] for row in rows_of(out)} == {"rotate", "rotate_backward", "stage_from_skew"}
    assert all(row["us"] <= row["default_us"] and row["tried"] > 4 for row in rows_of(out))


# --- The command ----------------------------------------------------------------------------------


def test_all_of_a_shape(out, capsys):
    assert command.main([*TINY, f"--out={out}"]) == 0
    rows = rows_of(out)
    native = {"rotated_linear", "blocking", "grain"} if native_library.library else set()
    ops = {"stage_from_skew", "stage_from_skew_backward", "scale", "scale_backward", *space.OF_ROWS}
    assert {row["op"] for row in rows} == ops | {"plan"} | native
    assert all(row["us"] <= row["default_us"] for row in rows)
    assert all(row["failed"] == [] for row in rows)
    assert all(row["floor_us"] > 0 for row in rows if row["structure"] or row["sizes"])
    content = tuned_file.read(out, CPU)
    assert content["rates"]["bytes"] > 1e8
    assert content["rates"]["flops"]["float32"] > 1e8
    assert "x the default" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(out, monkeypatch, capsys):
    right, asked = search.tune, []

    def tune(problem, *rest):
        asked.append(problem.op)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return right(problem, *rest)

    monkeypatch.setattr(command, "tune", tune)
    arguments = [*TINY, f"--out={out}", "--ops", "rotate", "gram", "scale_backward"]
    assert command.main(arguments) == 130
    assert [row["op"] for row in rows_of(out)] == asked[:1]
    assert command.main(arguments) == 0
    assert asked == ["rotate", "gram", "gram", "scale_backward"]
    assert f"1 of 3 are in {out} already" in capsys.readouterr().out
    assert command.main([*arguments, "--again"]) == 0
    assert asked[4:] == ["rotate", "gram", "scale_backward"]
    assert command.main([*TINY, f"--out={out}", "--ops", "gram", "--again"]) == 0
    assert {row["op"] for row in rows_of(out)} == {"rotate", "gram", "scale_backward"}


def test_what_was_chosen_is_timed_against_the_default(out, monkeypatch, capsys):
    arguments = [*TINY, f"--out={out}", "--ops", "rotate", "scale_backward"]
    assert command.main(arguments) == 0
    assert len(rows_of(out)) == 2
    capsys.readouterr()
    found = iter([(0.8, 0.9, 0.95), (0.9, 1.0, 1.1)])
    monkeypatch.setattr(command, "compare", lambda *_: next(found))
    assert command.main([*arguments, "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].endswith("0.900 [0.800, 0.950] of the default: faster")
    assert lines[-1].endswith("1.000 [0.900, 1.100] of the default: the same")
    monkeypatch.setattr(command, "compare", lambda *_: (1.01, 1.1, 1.2))
    assert command.main([*arguments, "--verify"]) == 1
    assert "SLOWER" in capsys.readouterr().out


def test_a_butterfly_takes_part_where_it_fits():
    shapes, machine = [Shape(48, 16, 20), Shape(64, 16, 20)], data_sheet(CPU)
    found = problems_of(shapes, [(3, 8), (4, 8)], torch.float32, CPU, machine, ["plan"])
    fitting = [(p.structure["n_factors"], p.sizes["features"]) for p in found]
    # 6 blocks are no multiple of 4, nor of 8; and their one stage, given
    assert fitting == [(3, 64), (1, 64), (4, 64), (1, 64)]


def test_comparing_pairs_the_rounds():
    world = World("fast")
    timer = type("Timer", (), {"device": CPU, "__call__": lambda _, run: world.timer(run)})()
    assert search.compare(world.problem, Choice((), "fast", {}), timer, 5) == (0.8, 0.8, 0.8)


def test_a_deadline_leaves_the_rest_for_the_next_time(out, capsys):
    assert command.main([*TINY, f"--out={out}", "--seconds=0.01"]) == 0
    assert rows_of(out) == []
    assert "0 measured" in capsys.readouterr().out


def test_a_lost_device_is_written_down_and_not_met_again(out, monkeypatch):
    def lost(problem, *rest):
        raise search.DeviceError(f"{problem}: CUDA error")

    monkeypatch.setattr(command, "tune", lost)
    arguments = [*TINY, f"--out={out}", "--ops", "rotate"]
    assert command.main(arguments) == command.LOST
    assert rows_of(out)[0]["backend"] == ""
    assert command.main(arguments) == 0  # nothing left to do


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_explain_marks_the_default(device, capsys, tuned_cache):
    explain.show(8192, 4096, 4096, 10, 8, torch.bfloat16, torch.device(device))
    title, header, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith(f"BOFT(10, 8), 4096 -> 4096, 8192 rows, bfloat16 on {device}")
    assert header.split()[:3] == ["stages", "sizes", "side"]
    assert len(lines) == 10 + 1
    (default,) = [line for line in lines if line.endswith("default, chosen")]
    assert int(default.split()[0]) == len(plan(10, 8, device))
    assert lines[-1].split()[:3] == ["1", "4096", "weight"]


def test_explain_marks_the_default_of_a_plan_on_which_the_device_was_lost(capsys, tuned_cache):
    structure, sizes = (2, 8), {"rows": 64, "features": 64, "outputs": 64}
    problem = problems.Problem(
        "plan", "float32", dict(zip(("n_factors", "block_size"), structure, strict=True)), sizes,
        CPU, make=None, run=None,
    )  # fmt: skip
    tuned_file.update(tuned_file.user_file(CPU), CPU, [command._lost(problem, RuntimeError())])
    explain.show(64, 64, 64, *structure, torch.float32, CPU)
    assert "default, chosen" in capsys.readouterr().out


def test_shapes(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text("[[64, 32, 7], [8, 8, 1]]")
    found = shapes_of(f"dinov2-large,12x34x56,{file}", 100)
    assert found[:3] == [(d, n, 100) for d, n in NAMED["dinov2-large"]]
    assert found[3:] == [(12, 34, 56), (64, 32, 7), (8, 8, 1)]
    for bad in ("llama", "1x2", "0x1x1", "axbxc"):
        with pytest.raises(ValueError, match="shapes: expected"):
            shapes_of(bad, 1)
    for bad in ("5", "{", "[5]", '["123"]', "[[1.5, 2, 3]]", "[[true, 2, 3]]", "[[1, 2, -3]]"):
        file.write_text(bad)
        with pytest.raises(ValueError, match=f"shapes: expected .*{file}"):
            shapes_of(str(file), 1)


WRONG = {  # arguments -> the end of the one line that says what is wrong with them
    "--explain 100 100 10": "block_size: expected a divisor of 100 features, got 8. Nearest",
    "--explain 64 -5 -3": "argument --explain: expected a positive whole number, got '-5'",
    "--explain 64 64 64 --butterfly 0x8": "argument --butterfly: expected e.g. 2x8,4x8, got '0x8'",
    "--butterfly 2x8x3": "argument --butterfly: expected e.g. 2x8,4x8, got '2x8x3'",
    "--butterfly two": "argument --butterfly: expected e.g. 2x8,4x8, got 'two'",
    "--butterfly 2x7": "--butterfly: none of [(2, 7)] fits any of --shapes",
    "--device bogus": "argument --device: expected cpu or cuda, got 'bogus'",
    "--device meta --explain 64 64 64": "argument --device: expected cpu or cuda, got 'meta'",
    "--device cuda:99": "argument --device: expected one of 2 GPUs, got 'cuda:99'",
    "--dtype int8": "argument --dtype: invalid choice: 'int8'",
    "--rows -5": "argument --rows: expected a positive whole number, got '-5'",
    "--rows 0": "argument --rows: expected a positive whole number, got '0'",
    "--seconds 0": "argument --seconds: expected a positive number, got '0'",
    "--seconds nan": "argument --seconds: expected a positive number, got 'nan'",
    "--seconds soon": "argument --seconds: expected a positive number, got 'soon'",
    "--backends bogus": "argument --backends: invalid choice: 'bogus'",
    "--backends cpu cuda": "--backends: expected backends of cpu, got 'cuda'",
    "--backends triton --ops compose": "--backends triton: no Triton kernel",
    "--out .": "--out: expected a file in a folder, got '.'",
    "--out mine.json/out.json": "--out: expected a file in a folder, got 'mine.json/out.json'",
    "--shapes mine.json": "shapes: expected a list of [d, n, rows], got 5 in 'mine.json'",
    "--shapes llama": "got 'llama' in 'llama'",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments_are_said_before_any_work(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend._ops["compose"], "missing", {"triton": "no Triton kernel"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(command, "measured", lambda *_: pytest.fail("measures"))
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
