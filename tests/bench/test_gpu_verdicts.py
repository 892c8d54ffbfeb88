"""Rules of bench/gpu_decide.py: each can be met, missed and left open."""

from dataclasses import replace

import pytest
import torch
from bench_modules import (
    BENCH,
    decide_contest,
    decide_errors,
    decide_kernels,
    decide_lines,
    decide_verdicts,
)

from boft_ops._runtime import backend
from boft_ops.triton_kernels.limits import H200
from boft_ops.tune import workloads

Figure, RULES = decide_lines.Figure, decide_verdicts.RULES
HOST = [f"enqueued, 4096x4096x{rows}" for rows in (16, 512, 2048, 8192)]
SHAPES = ["4096x4096x8192", "768x768x512"]


def contests():
    """Yield section, part, facts and contestants of a run that measured everything."""
    for part in HOST:
        yield "host", part, {}, ("lora-r16", "boft-2-8", "boft-2-8 triton", "boft-2-8 cuda")
    for op, copies in (("rotate", 1.0), ("rotate_backward", 1.5), ("rotate_stage_grad", 1.0)):
        for size in (16, 64, 128):
            yield "kernels", f"{op} {size}", {"op": op, "size": size}, ("triton", "cuda", "clone")
        for size in (32, 64):
            facts = {"op": op, "size": size, "stride": 8, "copies": copies, "block_size": 8}
            yield "kernels", f"{op} {size} apart", facts, ("triton", "cuda", "clone")
    for op in decide_verdicts.KERNELS + decide_verdicts.STAGES:
        for features in (4096, 2 << 20):
            facts = {"op": op, "features": features, "block_size": 8}
            yield "kernels", f"{op} {features}", facts, ("triton", "cuda")
    sides = ("linear", "boft-dense", "input side", "merged", "merged, kept", "merged dense")
    sides += ("input side, no scale", "weight side, no scale", "boft-dense in 3 stages")
    for shape in SHAPES:
        yield "host", f"loop in float32, {shape}", {}, ("boft-2-8", "boft-2-8 cuda")
        yield "steps", shape, {}, sides
        yield "layers", shape, {}, ("boft-2-8", "lora-r16", "peft-oft", "peft-boft")
    yield "model", "Llama", {}, ("boft-2-8", "lora-r16")
    products = ("plain", "alpha vector")
    yield "cublas", "products", {}, (*products, *(f"{name}, bias" for name in products))


def figures(changed=lambda figure: 1.0):
    """Make figures with times that meet every rule, each times what ``changed`` returns."""
    fast = dict.fromkeys(("boft-2-8", "boft-2-8 triton", "boft-dense in 3 stages"), 0.5)
    fast["boft-2-8 cuda"] = 0.4
    fast |= dict.fromkeys(("merged", "weight side, no scale", "merged, kept", "merged dense"), 0.5)
    made = []
    for section, part, facts, names in contests():
        for name in names:
            figure = Figure(section, part, name, name, "s", {}, facts)
            seconds = 70e-6 * fast.get(name, 1.0) * changed(figure)
            by_round = {i: seconds * noise for i, noise in enumerate((1.0, 2.0, 0.5))}
            if section == "kernels" and name != "clone" and "features" in facts:
                by_round = dict.fromkeys(range(3), seconds)
            made.append(figure._replace(by_round=by_round))
    return made


def verdicts(found):
    return {goal.text: goal.verdict for goal, _ in decide_verdicts.judge(found)}


def test_all_rules_can_be_met():
    judged = verdicts(figures())
    assert {text: judged[text] for text in judged if text in {rule.text for rule in RULES}} == (
        dict.fromkeys([rule.text for rule in RULES], "met")
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.text)
def test_each_rule_can_be_missed(rule):
    def slower(figure):
        concerned = (figure.section, figure.name) == (rule.section, rule.name)
        return 3.0 if concerned and rule.only(figure.part, figure.facts) else 1.0

    assert verdicts(figures(slower))[rule.text] == "not met"


def test_rules_are_not_measured_without_figures():
    judged = verdicts([])
    assert set(judged.values()) == {"not measured"}
    assert len(judged) == len(RULES) + 1  # one more for all errors


def test_figures_of_earlier_kernels_are_not_judged():
    """They have no block size."""
    old = [figure._replace(facts={**figure.facts, "block_size": None}) for figure in figures()]
    judged = verdicts(old)
    texts = [text for text in judged if text.startswith(decide_verdicts.STAGES)]
    texts += [text for text in judged if "that lie apart: C++" in text]
    assert [judged[text] for text in texts] == ["not measured"] * (2 + 3 + 4)


def error(part, name, *values):
    return Figure("errors", part, name, name, "1", dict(enumerate(values)), {"error": 1e-3})


def test_a_wrong_kernel_is_named():
    right, wrong = error("rotate", "triton", 0.5, 1.0), error("rotate", "cuda", 0.5, float("inf"))
    *_, (goal, _) = decide_verdicts.judge([right])
    assert (goal.verdict, goal.measured) == ("met", "1 of 1")
    *_, (goal, _) = decide_verdicts.judge([right, wrong])
    assert (goal.verdict, goal.measured) == ("not met", "1 of 2; not rotate by cuda")


@pytest.mark.parametrize(
    ("right", "time", "found"),
    [(0.5, 0.9, ["met"]), (0.5, 0.99, ["not met"]), (2.0, 0.9, []), (None, 0.9, [])],
)
def test_a_faster_tile_counts_if_it_is_right(right, time, found):
    tiles = {"triton": 1.0, "triton rows=128": time, "triton rows=32": 1.5, "clone": 0.8}
    made = [
        Figure("kernels", "rotate: tiles", name, name, "s", dict.fromkeys(range(3), value), {})
        for name, value in tiles.items()
    ]
    made += [error("rotate", "triton rows=32", 0.5)]
    if right is not None:
        made.append(error("rotate", "triton rows=128", right))
    goals = [g for g, _ in decide_verdicts.judge(made) if g.text.startswith("rotate: with")]
    if found:
        assert "with rows=128 at most 0.98" in goals[0].text
        assert [goal.verdict for goal in goals] == found
    else:
        assert "with rows=32" in goals[0].text


def test_the_page_has_every_rule():
    page = (BENCH.parent / "docs" / "tuning.md").read_text()
    for rule in RULES:
        assert f"| {rule.text} | {rule.then} |" in page


def test_the_cases_of_a_gpu_have_names_of_their_own():
    names = [case.part for case in decide_kernels.cases(decide_contest.setting("cuda", 60.0))]
    assert len(names) == len(set(names))
    assert "rotate, groups of 64, stride 16, 8192 rows of 4096" in names
    assert "stage_from_skew, (2,8) of 1245184 features" in names


@pytest.mark.skipif(not backend.has_triton(), reason="triton is not installed")
def test_variants_are_tiles_of_the_tuner():
    """On a GPU, for which only the device of the workload stands here."""
    case = decide_kernels.cases(decide_contest.setting("cpu", 1.0))[0]
    args = case.args(0)
    args = (args[0].bfloat16(), *args[1:])
    gpu = replace(case, workload=replace(case.workload, device=torch.device("cuda")))
    found = decide_kernels.choices(gpu, args, variants=3)
    default, *others = [variant for variant in found if variant.choice.backend == "triton"]
    assert (default.name, default.choice.config) == ("triton", ())
    assert len(others) == 3
    structure = {"size": 16, "chunk": 16, "stride": 1}
    nearest = workloads.tiles(case.op, structure, "bfloat16", -1)[:3]
    assert [variant.choice for variant in others] == nearest
    default = case.op.tiles().default(structure, "bfloat16", H200)
    for variant in others:
        changed = dict(part.split("=") for part in variant.name.split()[1:])
        assert changed
        assert default._replace(**{k: int(v) for k, v in changed.items()}) == tuple(
            dict(variant.choice.config).values()
        )


@pytest.mark.skipif(not backend.has_triton(), reason="triton is not installed")
def test_a_tile_is_measured_and_checked(tmp_path, monkeypatch):
    """By Triton's interpreter, in which the kernel takes another number of rows at a time."""
    monkeypatch.setitem(backend.PREFERENCE, "cpu", ("triton",))
    monkeypatch.setattr(decide_errors, "ROUNDS", 1)
    cpu = decide_contest.setting("cpu", 1.0)
    setting = replace(cpu, variants=1, rounds=1, sets=1, bulk=16, width=32)
    every = decide_kernels.cases(setting)
    case = next(c for c in every if c.part.startswith("rotate_backward, groups of 16"))
    make = case.make
    case = replace(case, make=lambda w: (*make(w)[:-1], 3))  # a CPU has one partial sum
    monkeypatch.setattr(decide_kernels, "cases", lambda setting: [case])
    path = tmp_path / decide_lines.NAME
    parts = dict(decide_kernels.parts(setting, decide_lines.Writer(path, "kernels")))
    parts[f"{case.part}: tiles"]()
    decide_errors.check(case, setting, decide_lines.Writer(path, "errors"))
    figures = decide_lines.figures(decide_lines.read(path))
    default, tile, *splits, clone = (f for f in figures if f.section == "kernels")
    assert (default.name, clone.name) == ("triton", "clone")
    assert tile.name.startswith("triton ")
    assert [f.name for f in splits] == [f"triton splits={n}" for n in (1, 2, 6)]
    assert tile.facts["tile"] != {} == default.facts["tile"]
    errors = {f.name: max(f.by_round.values()) for f in figures if f.section == "errors"}
    assert errors.keys() >= {default.name, tile.name, *[f.name for f in splits]}
    assert max(errors.values()) <= 1
