"""The report of the benchmarks: goals, floors, tables, CSV and chart of synthetic results."""

import csv
import json

import pytest
from bench_modules import chart, contestants, goals, page, results, run, sections, sizes
from synthetic_results import BOTH, FLOOR, PEFT_BOFT, SHAPES, measurements, synthetic, without


def judged(content):
    """Judge all goals on the content of a result file."""
    return goals.goals(results.Results(content))


# --- Goals ----------------------------------------------------------------------------------------


def test_all_goals_can_be_met():
    verdicts = judged(synthetic())
    assert [goal.verdict for goal in verdicts] == ["met"] * 11
    assert len({goal.text for goal in verdicts}) == 11


HALF, FOUR, DENSE = "at most half", "BOFT(4,4)", "BOFT(10,8)"
OFT, EXACT, FIVE, TWENTY = "(default)", "(exact)", "least 5 times", "least 20 times"


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"boft_2_8": 0.06}, [HALF]),
        ({"boft_2_8": 0.25}, [HALF, OFT, EXACT]),
        ({"boft_4_4": 0.11}, [FOUR]),
        ({"boft_dense": 0.11}, [DENSE]),
        ({"peft_oft": 0.03}, [OFT]),
        ({"peft_oft_exact": 0.03}, [EXACT]),
        ({"peft_boft": 19.0}, [TWENTY]),
        ({"peft_boft": 4.0}, [FIVE, TWENTY]),
        ({"ops": {("forward", "cayley"): 1 / 9}}, ["cayley, forward"]),
        ({"ops": {("backward", "cayley"): 1 / 9}}, ["cayley, backward"]),
        ({"ops": {("forward", "rotate-2-8"): 1.6}}, ["rotation (2,8), forward"]),
        ({"ops": {("backward", "rotate-2-8"): 2.6}}, ["rotation (2,8), backward"]),
    ],
)
def test_each_goal_can_be_missed(changes, missed):
    verdicts = judged(synthetic(**changes))
    texts = [goal.text for goal in verdicts if goal.verdict != "met"]
    assert len(texts) == len(missed)
    assert all(part in text for part, text in zip(missed, texts, strict=True))
    assert {goal.verdict for goal in verdicts} == {"met", "not met"}


def test_a_difference_around_the_bound_is_not_separable():
    goal = judged(synthetic(boft_2_8=[0.04, 0.051, 0.07]))[0]
    assert goal.verdict == "not separable"
    case = "768x768x512 not separable: +5.1% against +5.0%"
    assert f"{case}, difference +0.1% [-0.4%, +1.0%], kept in 1 of 3 rounds" in goal.measured
    goal = judged(synthetic(ops={("forward", "cayley"): [1 / 9, 1 / 10.5, 1 / 12]}))[7]
    assert goal.verdict == "not separable"
    assert goal.measured.startswith("10.50 [9.75, 11.25] times as fast as <solve>, kept in 2 of 3")


def test_only_rounds_in_which_both_ran_are_compared():
    content = synthetic()
    for entry in content["benchmarks"]:
        if entry["extra_info"]["contestant"] == PEFT_BOFT:
            entry["extra_info"]["rounds"] = [1]  # the slowest round of all other contestants
            entry["stats"]["data"] = [0.020 * 31]
    goal = next(goal for goal in judged(content) if TWENTY in goal.text)
    assert goal.measured == f"{31 / 1.04:.2f} [29.81, 29.81] times as fast as <{PEFT_BOFT}>, " + (
        "kept in 1 of 1 rounds"
    )


@pytest.mark.parametrize(
    ("excesses", "needed", "verdict"),
    [
        ([-1, -1, 0], 3, "met"),
        ([-1, -1, None], 3, "not separable"),
        ([-1, None, 1], 3, "not met"),
        ([-1, -1, 1], 2, "met"),
        ([-1, None, 1], 2, "not separable"),
        ([-1, 1, 1], 2, "not met"),
    ],
)
def test_verdict_on_several_shapes(excesses, needed, verdict):
    parts = [goals.Part("", "", [-1.0, 1.0] if e is None else [float(e)] * 2) for e in excesses]
    assert goals.joint_verdict(parts, needed) == verdict


@pytest.mark.parametrize(("boft", "verdict"), [(0.05, "met"), (0.11, "not met")])
def test_goals_in_plain_torch(boft, verdict):
    cheaper, faster = judged(synthetic("reference", boft_2_8=boft))
    assert "on at least 3 of 4 shapes" in cheaper.text
    assert (cheaper.verdict, faster.verdict) == (verdict, "met")
    assert "2048x2048x1024" in faster.text
    assert judged(synthetic("reference", peft_boft=4.0))[1].verdict == "not met"


def test_no_goal_is_judged_on_some_of_its_shapes():
    content = synthetic()
    some = without(content, lambda info: info["group"] == str(SHAPES[0]))
    assert [text for text, *_ in judged(some) if "each shape" in text] == []
    assert len(judged(some)) == 7
    layers = {str(shape) for shape in SHAPES[1:]}
    assert len(judged(without(content, lambda info: info["group"] in layers))) == 4
    assert judged(without(content, lambda info: True)) == []


def test_other_backends_have_no_goals():
    assert judged(synthetic("triton")) == []


# --- Floors ---------------------------------------------------------------------------------------


def test_floor_is_the_larger_of_bytes_and_flops():
    result = results.Results(synthetic())
    copy = result.find(sizes.CPU.rotation, "forward", "clone").info
    product = result.find(sizes.CPU.product, "forward", "mm").info
    assert result.rates() == (copy["bytes"] / 0.010, product["flops"] / 0.100)  # the best rounds
    assert result.floor(result.find(sizes.CPU.product, "forward", "mm")) == (0.100, "flops")
    # The rotation moves as many bytes as the copy, and its flops take less time than they do.
    rotation = result.find(sizes.CPU.rotation, "forward", "rotate-2-8")
    assert result.floor(rotation) == (0.010, "bytes")
    assert sections.op_cells(result, rotation)[1] == f"{0.010 / (0.012 * 1.4):.0%} (bytes)"
    assert result.floor(result.find(str(SHAPES[0]), BOTH, FLOOR)) is None


def test_no_floor_without_rates():
    content = without(synthetic(), lambda info: info["contestant"] == "mm")
    result = results.Results(content)
    assert result.rates() is None
    assert all(result.floor(row) is None for row in result.rows)
    assert "forward: <clone> | 12.000 | 1.00 | 1.4 |  |" in measurements(result)


# --- Tables, CSV, chart ---------------------------------------------------------------------------


def test_report_of_a_synthetic_result(tmp_path):
    content = synthetic(boft_2_8=0.05)
    result = results.Results(content)
    path = run.write(result, json.dumps(content), tmp_path / "results" / "cpu")
    assert path.name == "auto.json"
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(content["benchmarks"])
    row = next(r for r in rows if r["contestant"] == goals.OURS)
    assert (row["shape"], row["overhead"], row["median_ms"]) == ("768x768x512", "0.05", "12.6")
    assert (row["commit"], row["date"], row["device"]) == ("0123456789abcdef", "2030-01-02", "cpu")
    assert row["floor_ms"] == ""
    assert next(r for r in rows if r["contestant"] == "mm")["floor_ms"] == "100.0"
    assert [r["shape"] for r in rows if r["contestant"] == "boft-dense"] == ["4096x4096x512"] * 2

    written = tmp_path / "docs" / "benchmarks.md"
    written.parent.mkdir()
    written.write_text("<!-- table: results -->\n<!-- end of table -->\n")
    page.publish(tmp_path / "results", tmp_path)
    text = written.read_text()
    assert "| <boft-2-8> | +5.0 % [+5.0, +5.0] |" in text
    assert "| <boft-dense> |  |  |  | +9.0 % [+9.0, +9.0] |" in text
    assert "Not measured on a GPU" in text
    assert "- met: BOFT(4,4)" in text
    assert "forward: <mm> | 120.000 | 10.00 | 0.4 | 83% (flops) |" in text
    picture = tmp_path / "docs" / "images" / "bench_layer_some_cpu.svg"
    assert "time added to the frozen nn.Linear" in picture.read_text()
    assert picture.stat().st_size > 10_000


def test_tables_have_memory_and_trained_numbers_by_shape():
    content = synthetic()
    for entry in content["benchmarks"]:
        info = entry["extra_info"]
        if info["contestant"] == "more":  # a rank of its own at each shape
            info |= {"label": f"<more {info['group']}>", "note": "another rank at each shape"}
        if (info["contestant"], info["group"]) == ("boft-2-8", str(SHAPES[1])):
            info |= {"saved_bytes": 3 << 20, "peak_bytes": 5 << 20, "trainable": 1234}
    text = measurements(content)
    assert "| <boft-2-8> | 0.00 / 0.00 | 3.00 / 5.00 |" in text
    assert "| <boft-2-8> | 4,096 | 1,234 |" in text
    assert text.count("- Monarch (MoRe): another rank at each shape.") == 1
    assert "<more " not in text


def test_tables_of_shapes_without_a_restricted_contestant(tmp_path):
    large = str(contestants.Shape(4096, 4096, 512))
    result = results.Results(without(synthetic(), lambda info: info["group"] == large))
    assert "boft-dense" not in measurements(result)
    chart.draw(tmp_path / "chart.svg", result)
    assert (tmp_path / "chart.svg").stat().st_size > 10_000


def test_page_of_a_gpu_result_does_not_ask_for_a_gpu():
    content = synthetic()
    content["machine_info"]["device"] = "Some GPU"
    assert "Not measured on a GPU" not in measurements(content)
    assert set(chart.STYLES) == set(contestants.NAMES) - {FLOOR}
