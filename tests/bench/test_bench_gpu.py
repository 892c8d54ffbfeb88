"""The parts of the GPU benchmarks that can be tested without a GPU."""

from types import SimpleNamespace

import pytest
import torch
from bench_modules import (
    contestants,
    goals,
    gpu_operators,
    interleave,
    layer_operators,
    operators,
    results,
    sizes,
    test_layer,
)
from synthetic_results import benchmark, measurements, synthetic, without

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BULK = str(contestants.BULK)
CAYLEY, ROTATION = sizes.GPU.cayley, sizes.GPU.rotation

# Times that meet every goal, in units of the three durations 10, 20 and 12 ms.
MEASURED = {
    (CAYLEY, "forward"): {
        "solve": 0.4,
        "cayley": 0.003,
        "butterfly_groups": 0.004,
        "cayley-cuda": 0.003,
    },
    (ROTATION, "forward"): {
        "clone": 1.0,
        "rotate-2-8": 1.17,
        "rotate-4-8": 1.17,
        "rotate-6-8": 1.33,
        "rotate-10-8": 1.33,
    },
    (ROTATION, "backward"): {
        "clone": 1.0,
        "rotate-2-8": 1.99,
        "rotate-4-8": 1.99,
        "rotate-6-8": 1.99,
        "rotate-10-8": 1.99,
    },
    (BULK, operators.BOTH): {
        "linear": 1.0,
        "boft-2-8": 1.14,
        "lora-r16": 1.16,
        "peft-oft": 1.3,
        "peft-oft-exact": 1.3,
        "peft-boft": 9.0,
    },
}


def on_gpu(changes=None, dtype="bf16", backend="auto", measured=MEASURED):
    """Make the result of a GPU run that measured only the given times."""
    content = without(synthetic(backend), lambda info: True)
    for (group, direction), times in measured.items():
        suite = "layer" if group == BULK else "ops"
        more = dict.fromkeys(("saved_bytes", "peak_bytes", "adapter_bytes", "trainable"), 4096)
        for name, time in times.items():
            time = (changes or {}).get((group, direction, name), time)
            content["benchmarks"].append(benchmark(suite, group, direction, name, time, more))
    content["machine_info"] |= {"device": "Some GPU", "dtype": dtype}
    return results.Results(content)


# --- Goals ----------------------------------------------------------------------------------------


def test_all_gpu_goals_can_be_met():
    judged = goals.goals(on_gpu())
    assert [goal.verdict for goal in judged] == ["met"] * 12
    assert [goal.text for goal in judged] == goals.gpu_goals()
    assert (
        "rotation, 8192 rows of 4096 in groups of 16 and 64, forward: at least 85 %"
        in judged[0].text
    )
    assert judged[0].measured.startswith("16 met: 1.17 [1.17, 1.17] times, kept in 3 of 3 rounds;")
    assert judged[4].measured.startswith("48.0 [44.0, 64.0] µs")


@pytest.mark.parametrize(
    ("group", "direction", "name", "time", "missed"),
    [
        (ROTATION, "forward", "rotate-2-8", 1.18, [0]),
        (ROTATION, "forward", "rotate-4-8", 1.18, [0]),
        (ROTATION, "forward", "rotate-6-8", 1.34, [1]),
        (ROTATION, "forward", "rotate-10-8", 1.34, [1]),
        (ROTATION, "backward", "rotate-2-8", 2.01, [2]),
        (ROTATION, "backward", "rotate-4-8", 2.01, [2]),
        (ROTATION, "backward", "rotate-6-8", 2.01, [3]),
        (ROTATION, "backward", "rotate-10-8", 2.01, [3]),
        (CAYLEY, "forward", "butterfly_groups", 0.0075, [4]),
        (CAYLEY, "forward", "butterfly_groups", 0.012, [4, 5]),
        (CAYLEY, "forward", "solve", 0.19, [5]),
        (BULK, operators.BOTH, "boft-2-8", 1.155, [6]),
        (BULK, operators.BOTH, "boft-2-8", 1.2, [6, 7]),
        (BULK, operators.BOTH, "peft-oft", 1.13, [8]),
        (BULK, operators.BOTH, "peft-oft-exact", 1.13, [9]),
        (BULK, operators.BOTH, "peft-boft", 1.13, [10]),
        (CAYLEY, "forward", "cayley-cuda", 0.007, [11]),
    ],
)
def test_each_gpu_goal_can_be_missed(group, direction, name, time, missed):
    judged = goals.goals(on_gpu({(group, direction, name): time}))
    assert [i for i, goal in enumerate(judged) if goal.verdict != "met"] == missed
    assert {judged[i].verdict for i in missed} <= {"not met", "not separable"}


@pytest.mark.parametrize("other", [{"dtype": "fp32"}, {"backend": "reference"}])
def test_gpu_goals_need_bf16_and_kernels(other):
    assert goals.goals(on_gpu(**other)) == []


def test_a_cpu_has_no_gpu_goals():
    content = synthetic()
    content["machine_info"]["dtype"] = "bf16"
    texts = {goal.text for goal in goals.goals(results.Results(content))}
    assert len(texts) == 11
    assert texts.isdisjoint(goals.gpu_goals())


# --- Page -----------------------------------------------------------------------------------------


def test_page_lists_gpu_goals_as_not_measured_without_a_gpu_result():
    text = measurements(synthetic())
    assert "### GPU\n" in text
    assert 'make bench ARGS="--device cuda' in text
    assert all(f"- not measured: {goal}." in text for goal in goals.gpu_goals())
    text = measurements(synthetic(), on_gpu())
    assert "not measured" not in text
    assert all(f"- met: {goal}." in text for goal in goals.gpu_goals())


def test_page_names_contestants_that_were_left_out():
    some = {key: dict(times) for key, times in MEASURED.items()}
    del some[BULK, operators.BOTH]["peft-boft"]
    result = on_gpu(measured=some)
    for row in result.rows:
        if row.group == BULK:
            row.info["left_out"] = ["peft-boft"]
    assert f"Left out at {BULK}, because there was too little memory: peft-boft." in measurements(
        result
    )
    assert len(goals.goals(result)) == 11


# --- Sizes ----------------------------------------------------------------------------------------


def test_sizes_are_chosen_by_device():
    assert sizes.sizes_on("cpu") == sizes.CPU
    assert sizes.sizes_on("cuda") == sizes.sizes_on("Some GPU") == sizes.GPU
    on_cpu = contestants.default_shapes(CPU)
    assert on_cpu == (*contestants.SHAPES, *contestants.SMALL_SHAPES)
    assert contestants.default_shapes(CUDA) == ((4096, 4096, 8192), *on_cpu)
    assert ROTATION == "rotation, 8192 rows of 4096"
    assert CAYLEY == "cayley, of Llama-3.1-8B, 311296 blocks 8x8"
    assert len(sizes.GPU.linears) == 224


def test_groups_on_a_cpu_have_the_names_of_the_committed_results():
    assert sizes.CPU.product == "product, 2048x2048x2048"
    assert sizes.CPU.cayley == "cayley, 4096 blocks 8x8"
    assert sizes.CPU.rotation == "rotation, 1024 rows of 2048"
    assert sizes.CPU.linear == "linear, 2048x2048x1024"


def test_work_of_a_gpu_sized_rotation():
    n = sizes.GPU.rows * sizes.GPU.features
    for name, mixed in (("rotate-4-8", 64), ("rotate-10-8", 128 + 128)):
        forward = operators.work(ROTATION, "forward", name, CUDA, torch.bfloat16)
        assert forward == (4 * n, 2 * n * mixed)
        backward = operators.work(ROTATION, "backward", name, CUDA, torch.bfloat16)
        assert backward == (6 * n, 4 * n * mixed)
    numbers = sizes.GPU.n_blocks * (28 + 64)
    assert operators.work(CAYLEY, "forward", "butterfly_groups", CUDA, torch.bfloat16) == (
        4 * numbers,
        0,
    )


# --- Operands -------------------------------------------------------------------------------------

TINY = sizes.GPU._replace(
    rows=40, features=64, rotations={"rotate-2-8": (2, 8), "rotate-4-8": (4, 8)}, linears=(32, 64)
)._replace(n_blocks=24)  # two factors of these layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", [False, True])
def test_rows_are_rotated(backward, dtype):
    members = gpu_operators.rotation_contest(TINY, backward, CPU, dtype)
    assert [c.name for c in members] == ["clone", *TINY.rotations]
    for contestant in members:
        result = contestant.run()
        y = result[0] if isinstance(result, tuple) else result
        assert (y.shape, y.dtype, y.requires_grad) == ((40, 64), dtype, False)
        assert isinstance(result, tuple) == (backward and contestant.name != "clone")


def test_the_rival_backend_takes_part_if_it_is_available(monkeypatch):
    for module in (gpu_operators, layer_operators, operators):
        monkeypatch.setattr(module, "rivals", lambda: ("reference",))
    members = gpu_operators.rotation_contest(TINY, False, CPU, torch.float32)
    pairs = [n for name in TINY.rotations for n in (name, f"{name}-reference")]
    assert [c.name for c in members] == ["clone", *pairs]
    torch.testing.assert_close(members[1].run(), members[2].run(), rtol=1e-5, atol=1e-5)
    *_, cayley, _, rival = gpu_operators.cayley_contest(TINY, CPU, operators.solve)
    assert rival.name == "cayley-reference"
    torch.testing.assert_close(rival.run(), cayley.run())
    assert operators.label("rotate-2-8-reference", CUDA) == "stages of (2,8), reference"
    one, other = (
        operators.work(ROTATION, "forward", name, CUDA, torch.bfloat16)
        for name in ("rotate-4-8", "rotate-4-8-reference")
    )
    assert one == other
    monkeypatch.setattr(operators, "sizes_on", lambda device: TINY)
    for group in (TINY.scale, TINY.compose):
        names = [c.name for c in operators.contest(group, "backward", CPU, torch.float32)]
        assert tuple(names) == operators.members(CPU, torch.float32)[group, "backward"]


def test_rotations_of_a_whole_model():
    solve, cayley, groups = gpu_operators.cayley_contest(TINY, CPU, operators.solve)
    assert solve.run().shape == (2 * 12, 8, 8)
    assert cayley.run().shape == (2, 12, 8, 8)
    assert [group.shape for group in groups.run()] == [(2, 16, 16), (4, 16, 16)]


def test_wrong_rotations_are_not_timed(monkeypatch):
    apply_stages = gpu_operators.apply_stages

    def wrong(x, *rest):
        return apply_stages(x, *rest) * (1 + (x.dtype == torch.float32))

    monkeypatch.setattr(gpu_operators, "apply_stages", wrong)
    with pytest.raises(AssertionError, match="rotate-2-8: output: relative error"):
        gpu_operators.rotation_contest(TINY, False, CPU, torch.float32)


def test_the_whole_suite_accepts_gpu_sizes(monkeypatch):
    """The suite makes the choices for a GPU, but with tiny operands on the CPU."""
    monkeypatch.setattr(operators, "sizes_on", lambda device: TINY)
    groups = operators.members(CPU, torch.float32)
    assert groups[TINY.cayley, "forward"] == ("solve", "cayley", "butterfly_groups")
    assert (TINY.cayley, "backward") not in groups
    members = operators.contest(TINY.cayley, "forward", CPU, torch.float32)
    assert [c.name for c in members] == ["solve", "cayley", "butterfly_groups"]
    members = operators.contest(TINY.rotation, "backward", CPU, torch.float32)
    assert isinstance(members[1].run(), tuple)
    for (group, direction), names in groups.items():
        for name in names:
            assert operators.label(name, CPU)
            assert operators.work(group, direction, name, CPU, torch.float32).bytes > 0
    assert operators.label("rotate-2-8", CUDA) == "stages of (2,8)"


def test_a_duration_is_that_of_one_of_several_calls():
    now = [0.0]

    def run():
        now[0] += 0.25

    contestants_ = [interleave.Contestant("a", run)]
    durations = interleave.measure(
        contestants_, rounds=9, seconds=20.0, calls=8, clock=lambda: now[0]
    )
    assert durations == {"a": dict.fromkeys(range(7), 0.25)}  # 15 s of the 20 are seven rounds


# --- Memory ---------------------------------------------------------------------------------------


def a_contest(monkeypatch, failing, when):
    """Make a contest in which a contestant runs out of memory when it is built or first run."""

    def fails(name):
        if name == failing:
            raise torch.OutOfMemoryError("no memory left")

    build, memory = test_layer.build, test_layer.Contest._memory
    if when == "built":
        monkeypatch.setattr(test_layer, "build", lambda n, base: fails(n) or build(n, base))
    else:
        monkeypatch.setattr(
            test_layer.Contest, "_memory", lambda c, job: fails(job.entry.name) or memory(c, job)
        )
    monkeypatch.setattr(test_layer, "check_gradients", lambda *_: None)
    values = {"rounds": 1, "seconds": 0.01, "extras": ()}
    lines = []
    reporter = SimpleNamespace(write_line=lines.append)
    options = SimpleNamespace(
        getoption=values.__getitem__,
        pluginmanager=SimpleNamespace(get_plugin=lambda _: reporter),
    )
    shape = contestants.Shape(64, 8, 4)
    return test_layer.Contest(shape, CPU, torch.float32, options), lines


@pytest.mark.parametrize("when", ["built", "first run"])
def test_a_contestant_that_needs_too_much_memory_is_left_out(monkeypatch, when):
    contest, lines = a_contest(monkeypatch, contestants.PEFT_BOFT, when)
    assert contest.left_out == [contestants.PEFT_BOFT]
    assert list(contest.jobs) == [
        name for name in contestants.names(contest.shape) if name != contestants.PEFT_BOFT
    ]
    assert lines == ["64x8x4: peft-boft needs more memory than there is, and is left out"]
    facts = contest.facts("linear", "forward")
    assert facts["left_out"] == [contestants.PEFT_BOFT]


def test_nothing_is_compared_without_the_frozen_layer(monkeypatch):
    with pytest.raises(torch.OutOfMemoryError):
        a_contest(monkeypatch, contestants.FLOOR, "built")


def test_the_test_of_a_contestant_left_out_is_skipped():
    contest = SimpleNamespace(left_out=["peft-boft"])
    with pytest.raises(pytest.skip.Exception):
        test_layer.test_layer(None, lambda shape: contest, None, "64x8x4", "forward", "peft-boft")
