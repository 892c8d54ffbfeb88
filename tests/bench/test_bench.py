"""The benchmarks: interleaving, replay, memory, operators, and a whole run on a tiny shape."""

import itertools
import json
import platform
import subprocess
import sys

import pytest
import torch
from bench_modules import (
    BENCH,
    contestants,
    correctness,
    definitions,
    goals,
    interleave,
    layer_operators,
    memory,
    models,
    operators,
    peers,
    sizes,
)
from bench_modules import results as results_

from boft_ops._runtime import backend

ROOT = BENCH.parent
CPU = torch.device("cpu")


# --- Interleaving ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "period"), [(2, 2), (8, 8), (5, 10)])
def test_each_contestant_follows_each_other_equally_often(n, period):
    rows = [interleave.order(n, round_) for round_ in range(period)]
    pairs = [pair for row in rows for pair in itertools.pairwise(row)]
    assert all(sorted(row) == list(range(n)) for row in rows)
    assert {pairs.count(pair) for pair in itertools.permutations(range(n), 2)} == {period // n}


class World:
    """A clock that contestants move by known amounts, and a log of their runs."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def contestant(self, name, seconds):
        def run_():
            self.log.append(name)
            self.now += seconds

        def reset():
            self.now += 100.0  # outside of the timed part

        return interleave.Contestant(name, run_, reset)


def test_measure_interleaves_and_times_only_the_call():
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


def test_peak_counts_allocations_of_the_backward():
    x = torch.randn(1 << 18, requires_grad=True)  # 1 MiB
    # exp keeps its output. Its gradient exists at the same time as the output and its gradient.
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
def test_correct_layers_may_be_timed(m, b):
    correctness.check_gradients(m, b, CPU, torch.float32)


def test_wrong_layers_may_not_be_timed(monkeypatch):
    forward = correctness.BOFTLinear.forward
    layer = correctness.BOFTLinear(16, 8)
    x, grad = torch.randn(4, 16), torch.randn(4, 8)
    correctness.check_merged(layer, x, grad)
    monkeypatch.setattr(correctness.BOFTLinear, "forward", lambda self, x: forward(self, x) * 1.001)
    with pytest.raises(AssertionError, match=r"output: relative error 0\.001"):
        correctness.check_merged(layer, x, grad)
    with pytest.raises(AssertionError, match="relative error"):
        correctness.check_gradients(2, 8, CPU, torch.float32)


# --- Operators ------------------------------------------------------------------------------------


def test_operators_that_take_part(monkeypatch):
    # These sizes are small, but large enough for the kernels.
    monkeypatch.setattr(sizes, "CPU", sizes.CPU._replace(rows=64, features=64, n_blocks=5))
    for (group, direction), names in operators.members(CPU, torch.float32).items():
        members = operators.contest(group, direction, CPU, torch.float32)
        assert tuple(m.name for m in members) == names
        for member in members:
            member.run()
            member.run()  # a second time, because a backward must run in every round
            work = operators.work(group, direction, member.name, CPU, torch.float32)
            assert work.bytes > 0
            assert (work.flops == 0) == (member.name == "clone")


def test_the_fused_layer_takes_part_where_a_kernel_serves_it():
    with backend.force("reference"):
        groups = {group for group, _ in operators.members(CPU, torch.float32)}
    everywhere = {"product", "cayley", "rotation", "compose", "scale"}
    assert groups == {getattr(sizes.CPU, name) for name in everywhere}


def test_work_of_a_rotation():
    n, group = sizes.CPU.rows * sizes.CPU.features, sizes.CPU.rotation
    forward = operators.work(group, "forward", "rotate-2-8", CPU, torch.float32)
    assert forward == (8 * n, 2 * n * 16)
    backward = operators.work(group, "backward", "rotate-4-4", CPU, torch.bfloat16)
    assert backward == (6 * n, 4 * n * 32)


def test_work_of_the_operators_beside_the_rotation():
    cpu = sizes.CPU
    numbers = cpu.rows * cpu.features
    work = {
        (group, direction): operators.work(group, direction, name, CPU, torch.float32)
        for group, name in ((cpu.scale, "scale-reference"), (cpu.compose, "compose"))
        for direction in ("forward", "backward")
    }
    assert work[cpu.scale, "forward"] == (8 * numbers, 2 * numbers)
    assert work[cpu.scale, "backward"] == (12 * numbers, 5 * numbers)
    assert cpu.composed == 2048  # blocks in each of the 4 factors of a stage of size 64
    features = 8 * 2048
    assert work[cpu.compose, "forward"] == (
        4 * features * (32 + 64),
        16 * features * (16 + 32 + 64),
    )
    assert work[cpu.compose, "backward"].bytes == 4 * features * (64 + 64)


def test_a_wrong_scale_is_not_timed(monkeypatch):
    monkeypatch.setattr(sizes, "CPU", sizes.CPU._replace(rows=64, features=64))
    op = layer_operators.scale_forward
    raw = op.raw
    monkeypatch.setattr(op, "raw", lambda *args: raw(*args) * 1.001)
    with pytest.raises(AssertionError, match="scale: result 0: relative error"):
        operators.contest(sizes.CPU.scale, "forward", CPU, torch.float32)


def test_some_contestants_take_part_at_some_shapes_only():
    always = [name for name in contestants.NAMES if name not in contestants.EXTRAS]
    everywhere = [name for name in always if name != "boft-dense"]
    assert contestants.names(contestants.Shape(2048, 4096, 8)) == everywhere
    assert contestants.names(contestants.Shape(4096, 8, 8)) == always
    with_extras = contestants.names(contestants.Shape(4096, 8, 8), contestants.EXTRAS)
    assert with_extras == list(contestants.NAMES)


def test_plain_torch_is_the_same_layer():
    """The layer for torch.compile has the outputs and gradients of BOFTLinear."""
    torch.manual_seed(0)
    base = contestants.frozen(contestants.Shape(64, 48, 8), CPU, torch.float32)
    plain = peers.PlainBOFT(base, n_factors=3, block_size=8)
    ours = contestants.BOFTLinear.from_linear(base, n_factors=3, block_size=8)
    with torch.no_grad():
        ours.skew.copy_(plain.skew.normal_(0, 0.3))
        ours.scale_offset.copy_(plain.scale.normal_(1, 0.3) - 1)
    x, grad = torch.randn(8, 64, requires_grad=True), torch.randn(8, 48)
    outputs = [layer(x) for layer in (plain, ours)]
    torch.testing.assert_close(*outputs)
    for one, other in zip(
        torch.autograd.grad(outputs[0], (x, plain.skew, plain.scale), grad),
        torch.autograd.grad(outputs[1], (x, ours.skew, ours.scale_offset), grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.exhaustive_if(condition=lambda name: name == "compiled-boft")  # compiles for long
@pytest.mark.parametrize("name", contestants.NAMES)
def test_every_contestant_computes_what_it_is_named_after(name, monkeypatch):
    monkeypatch.setenv(peers.NO_EXTENSION, "1")
    if name == "lycoris-boft":
        pytest.importorskip("lycoris.modules.boft", reason="LyCORIS is not installed")
    definitions.check_definition(name, CPU, torch.float32)


def spoiled(cls, monkeypatch):
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: forward(self, x.roll(1, 1)))


@pytest.mark.parametrize(
    ("name", "cls"), [("peft-boft-activation", peers.ActivationBOFT), ("more", peers.MoRe)]
)
def test_a_wrong_rival_is_not_timed(name, cls, monkeypatch):
    spoiled(cls, monkeypatch)
    with pytest.raises(AssertionError, match=f"{name}: output: relative error"):
        definitions.check_definition(name, CPU, torch.float32)


def test_rivals_with_a_rank_have_about_as_many_parameters():
    for shape in contestants.SHAPES[:2]:
        base = contestants.frozen(shape, CPU, torch.float32)
        ours, psoft, more = (
            sum(p.numel() for p in contestants.build(name, base).trainable())
            for name in ("boft-2-8", "peft-psoft", "more")
        )
        assert psoft == pytest.approx(ours, rel=0.1)
        assert more == pytest.approx(ours, rel=0.2)


def test_lycoris_takes_part_if_it_is_installed():
    pytest.importorskip("lycoris.modules.boft", reason="LyCORIS is not installed")
    base = contestants.frozen(contestants.Shape(64, 32, 8), CPU, torch.float32)
    entry = contestants.build("lycoris-boft", base)
    assert entry.label == "LyCORIS BOFT(3,8)"
    x = torch.randn(4, 64, requires_grad=True)
    y = entry.layer(x)
    assert not torch.equal(y, base(x))  # the adapter is in use
    y.sum().backward()
    assert all(p.grad is not None for p in entry.trainable())


# --- Models ---------------------------------------------------------------------------------------


def test_models_share_their_weights_and_adapt_all_linears():
    base = models.base("tiny", CPU, torch.float32)
    ids = models.text("tiny", CPU)
    expected = base(input_ids=ids).logits
    assert ids.shape == (1, 16)
    for name in models.LABELS:
        model = models.build(name, base)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)
        ours, theirs = (
            {p.data_ptr() for p in m.parameters() if not p.requires_grad} for m in (model, base)
        )
        assert ours == theirs  # nothing frozen was copied
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        for target in models.TARGETS:
            assert sum(f".{target}." in n for n in trained) >= models.MODELS["tiny"].layers
        losses = [float(models.training_step(model, ids)()) for _ in range(2)]
        assert losses[1] < losses[0]
        assert models.label(name, model).startswith(models.LABELS[name])


def test_shapes_are_parsed():
    assert contestants.Shape.parse("768x3072x512") == (768, 3072, 512)
    with pytest.raises(ValueError, match="expected DxNxTOKENS, got '768'"):
        contestants.Shape.parse("768")


# --- A whole run ----------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_bench_of_a_tiny_shape(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(BENCH / "run.py"), "--shapes=64x48x32", "--rounds=2"]
    command += ["--seconds=1", f"--out={out}", "--backend=reference", "--suites=layer,ops"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (out / "reference.json").read_text()
    assert platform.node() not in text
    assert str(ROOT) not in text
    result = results_.Results(json.loads(text))
    assert set(result.machine["serving"].values()) == {"reference"}
    rows = {row.name: row.info for row in result.table("64x48x32", operators.BOTH)}
    assert list(rows) == contestants.names(contestants.Shape(64, 48, 32))
    assert rows[contestants.FLOOR]["overhead"] == 0
    assert rows[contestants.FLOOR]["saved_bytes"] == rows[contestants.FLOOR]["adapter_bytes"] == 0
    x, hidden, out_ = 32 * 64 * 4, 32 * 16 * 4, 32 * 48 * 4
    assert rows[contestants.LORA]["saved_bytes"] == x + hidden
    blocks, stages = 2 * 8 * 8 * 8 * 4, 4 * 16 * 16 * 4
    assert x <= rows[goals.OURS]["saved_bytes"] <= x + out_ + 2 * blocks + 2 * stages
    assert rows[goals.OURS]["trainable"] == 2 * 64 * 7 // 2 + 48
    assert "PEFT BOFT(1,8)" in done.stdout
    assert len(result.groups("ops")) == 10
    assert all(result.floor(row).seconds > 0 for row in result.rows if row.suite == "ops")
