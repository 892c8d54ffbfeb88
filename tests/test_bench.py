"""The benchmarks: interleaving, replay, counters, report; and all of it on a tiny shape."""

import csv
import itertools
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))  # as if one of its scripts were run
try:
    import chart
    import correctness
    import interleave
    import memory
    import page
    import results
    import run
    from contestants import FLOOR, LORA, NAMES, PEFT_BOFT, SHAPES, Shape
finally:
    sys.path.remove(str(BENCH))

CPU = torch.device("cpu")


# --- Interleaving ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "period"), [(2, 2), (8, 8), (5, 10)])
def test_everyone_follows_everyone_equally_often(n, period):
    rows = [interleave.order(n, round_) for round_ in range(period)]
    pairs = [pair for row in rows for pair in itertools.pairwise(row)]
    assert all(sorted(row) == list(range(n)) for row in rows)
    assert {pairs.count(pair) for pair in itertools.permutations(range(n), 2)} == {period // n}


class World:
    """A clock that contestants move by known amounts, and a log of what happened."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def contestant(self, name, seconds):
        def run_():
            self.log.append(name)
            self.now += seconds

        def reset():
            self.now += 100.0  # outside of the timed part

        return interleave.Contestant(name, run_, reset)


def test_measure_interleaves_and_times_the_call_alone():
    world = World()
    contestants = [world.contestant("a", 0.25), world.contestant("b", 0.5)]
    durations = interleave.measure(contestants, rounds=4, seconds=1e9, clock=lambda: world.now)
    assert durations == {"a": dict.fromkeys(range(4), 0.25), "b": dict.fromkeys(range(4), 0.5)}
    assert world.log[4:] == ["a", "b", "b", "a"] * 2  # after the warm-up
    assert interleave.ratios(durations, "b", "a") == [2.0] * 4


def test_slow_contestants_run_in_a_few_rounds():
    estimates = {"a": 1.0, "b": 1.0, "c": 1.5, "slow": 20.0}
    n_rounds, turns = interleave.schedule(estimates, rounds=1000, seconds=160.0)
    assert n_rounds == int(0.75 * 160 / 3.5)
    assert turns["slow"] == {n_rounds // 4, 3 * n_rounds // 4}
    assert all(turns[name] == set(range(n_rounds)) for name in "abc")


def test_rounds_are_bounded():
    assert interleave.schedule({"a": 1e-6, "b": 1e-6}, 12, 60.0)[0] == 12
    assert interleave.schedule({"a": 9.0, "b": 9.0}, 12, 60.0)[0] == interleave.MIN_ROUNDS
    assert interleave.schedule({"a": 9.0, "b": 9.0}, 3, 60.0)[0] == 3


def test_summary():
    assert interleave.summary([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0)
    assert interleave.summary([1.5]) == (1.5, 1.5, 1.5)


REPLAY = """
import sys
sys.path.insert(0, {bench!r})
import pytest
from interleave import ReplayClock
CLOCK = ReplayClock()

@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize("durations", {durations!r})
def test_replay(benchmark, durations):
    CLOCK.replay(benchmark, durations)
"""


def test_replay_is_exact_to_the_last_bit(tmp_path):
    durations = [[0.1, 0.2, 0.3, 1 / 3], [1e-7, 3.3333e-5, 12.0]]
    script, output = tmp_path / "test_replay.py", tmp_path / "out.json"
    script.write_text(REPLAY.format(bench=str(BENCH), durations=durations))
    command = [sys.executable, "-m", "pytest", "-q", str(script), f"--benchmark-json={output}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    stats = [b["stats"] for b in json.loads(output.read_text())["benchmarks"]]
    assert [s["data"] for s in stats] == durations


# --- Memory ---------------------------------------------------------------------------------------


def test_peak_of_known_allocations():
    def allocate():
        a = torch.zeros(1 << 20, dtype=torch.uint8)
        b = torch.zeros(2 << 20, dtype=torch.uint8)
        del a
        c = torch.zeros(4 << 20, dtype=torch.uint8)
        del b, c

    assert memory.peak_bytes(allocate, CPU) == 6 << 20


def test_peak_counts_what_is_allocated_in_the_backward():
    x = torch.randn(1 << 18, requires_grad=True)  # 1 MiB
    # exp keeps its output; its gradient is made while that and the incoming one are there
    peak = memory.peak_bytes(lambda: x.exp().backward(torch.ones(1 << 18)), CPU)
    assert peak == 3 << 20


def test_saved_bytes_count_a_storage_once_and_parameters_never():
    weight = torch.randn(16, 8, requires_grad=True)
    x = torch.randn(32, 8, requires_grad=True)
    assert memory.saved_bytes(lambda: x @ weight.T, [weight]) == x.nbytes
    assert memory.saved_bytes(lambda: x @ weight.T) == x.nbytes + weight.nbytes
    assert memory.saved_bytes(lambda: x[:4] * x[4:8]) == x.nbytes  # two views of one storage
    assert memory.saved_bytes(lambda: x + 1) == 0


# --- Correctness ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "b"), [(1, 16), (2, 8), (4, 4), (10, 8)])
def test_right_layers_may_be_timed(m, b):
    correctness.check_gradients(m, b, CPU, torch.float32)


def test_wrong_layers_may_not(monkeypatch):
    right = correctness.BOFTLinear.forward
    layer = correctness.BOFTLinear(16, 8)
    x, grad = torch.randn(4, 16), torch.randn(4, 8)
    correctness.check_merged(layer, x, grad)
    monkeypatch.setattr(correctness.BOFTLinear, "forward", lambda self, x: right(self, x) * 1.001)
    with pytest.raises(AssertionError, match=r"output: relative error 0\.001"):
        correctness.check_merged(layer, x, grad)
    with pytest.raises(AssertionError, match="relative error"):
        correctness.check_gradients(2, 8, CPU, torch.float32)


# --- Report ---------------------------------------------------------------------------------------


def synthetic(overheads):
    """A result of all shapes in which contestants take 1 + overhead times as long as the floor."""
    benchmarks = []
    for shape, direction, name in itertools.product(SHAPES, ("forward", results.BOTH), NAMES):
        ratio = 1 + overheads.get(name, 0.2)
        data = [0.010 * ratio, 0.020 * ratio, 0.012 * ratio]
        info = {"suite": "layer", "group": str(shape), "contestant": name, "label": f"<{name}>"}
        info |= {"note": "", "direction": direction, **shape._asdict(), "rounds": [0, 1, 2]}
        info |= {"ratio": ratio, "ratio_q1": ratio, "ratio_q3": ratio, "overhead": ratio - 1}
        info |= dict.fromkeys(("saved_bytes", "peak_bytes", "adapter_bytes", "trainable"), 4096)
        stats = {"data": data, "median": 0.012 * ratio, "q1": 0.010 * ratio, "q3": 0.020 * ratio}
        benchmarks.append({"extra_info": info | {"threads": 2}, "stats": stats})
    machine = {"device": "cpu", "cpu": "Some CPU", "threads": 2, "dtype": "fp32", "torch": "2.13"}
    machine |= {"backend": "auto", "peft": "0.21", "boft_ops": "0.1", "python": "3.12"}
    machine |= {"triton": None, "serving": {"cayley": "cpu", "rotate": "reference"}}
    return {
        "machine_info": machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2030-01-02T03:04:05",
        "benchmarks": benchmarks,
    }


@pytest.mark.parametrize(("boft", "met"), [(0.05, True), (0.1, True), (0.11, False)])
def test_goal_against_lora(boft, met):
    overheads = {FLOOR: 0.0, LORA: 0.1, results.OURS: boft, PEFT_BOFT: 9.0}
    cheaper, faster = results.goals(results.Results(synthetic(overheads)))
    assert cheaper.met == met
    assert cheaper.measured.startswith("on 4" if met else "on 0")
    assert faster.met
    assert f"{10 / (1 + boft):.1f} times" in faster.measured


def test_goal_against_peft_boft():
    overheads = {FLOOR: 0.0, results.OURS: 0.1, PEFT_BOFT: 4.0}
    assert not results.goals(results.Results(synthetic(overheads)))[1].met


def test_no_goal_is_judged_on_some_of_its_shapes():
    content = synthetic({FLOOR: 0.0})
    of_shape = [b for b in content["benchmarks"] if b["extra_info"]["group"] == str(SHAPES[0])]
    assert results.goals(results.Results(content | {"benchmarks": of_shape})) == []


def test_report_of_a_synthetic_result(tmp_path):
    content = synthetic({FLOOR: 0.0, LORA: 0.1, results.OURS: 0.05, PEFT_BOFT: 30.0})
    found = results.Results(content)
    path = run.write(found, json.dumps(content), tmp_path / "results" / "cpu")
    assert path.name == "auto.json"
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(content["benchmarks"])
    row = next(r for r in rows if r["contestant"] == results.OURS)
    assert (row["shape"], row["overhead"], row["median_ms"]) == ("768x768x512", "0.05", "12.6")
    assert (row["commit"], row["date"], row["device"]) == ("0123456789abcdef", "2030-01-02", "cpu")

    run.publish(tmp_path / "results", tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| <boft-2-8> | +5.0 % [+5.0, +5.0] |" in text
    assert "Not measured on a GPU" in text
    assert "- met: BOFT(2,8)" in text
    picture = tmp_path / "images" / "bench_layer_cpu.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_page_tells_of_a_gpu(tmp_path):
    content = synthetic({FLOOR: 0.0})
    content["machine_info"]["device"] = "Some GPU"
    page.write(tmp_path / "page.md", [results.Results(content)])
    assert "Not measured on a GPU" not in (tmp_path / "page.md").read_text()
    assert set(chart.STYLES) == set(NAMES) - {FLOOR}


def test_shapes_are_parsed():
    assert Shape.parse("768x3072x512") == (768, 3072, 512)
    with pytest.raises(ValueError, match="expected DxNxTOKENS, got '768'"):
        Shape.parse("768")


# --- All of it ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_of_a_tiny_shape(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(BENCH / "run.py"), "--shapes=64x48x32", "--rounds=2"]
    command += ["--seconds=1", f"--out={out}", "--backend=reference"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (out / "reference.json").read_text()
    assert platform.node() not in text
    assert str(ROOT) not in text
    found = results.Results(json.loads(text))
    assert set(found.machine["serving"].values()) == {"reference"}
    rows = {row.name: row.info for row in found.table("64x48x32", results.BOTH)}
    assert tuple(rows) == NAMES
    assert rows[FLOOR]["overhead"] == 0
    assert rows[FLOOR]["saved_bytes"] == rows[FLOOR]["adapter_bytes"] == 0
    x, hidden, out_ = 32 * 64 * 4, 32 * 16 * 4, 32 * 48 * 4
    assert rows[LORA]["saved_bytes"] == x + hidden
    blocks, stages = 2 * 8 * 8 * 8 * 4, 4 * 16 * 16 * 4
    assert x <= rows[results.OURS]["saved_bytes"] <= x + out_ + 2 * blocks + 2 * stages
    assert rows[results.OURS]["trainable"] == 2 * 64 * 7 // 2 + 48
    assert "PEFT BOFT(1,8)" in done.stdout
    assert len(found.groups("ops")) == 4
