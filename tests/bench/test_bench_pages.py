"""The figures of the pages: made from the committed results, and of nothing else."""

import csv
import json

import pytest
from bench_modules import (
    BENCH,
    contestants,
    decide_page,
    machines,
    page,
    prices,
    recording,
    run,
    store,
    summary,
)
from bench_modules import results as results_
from synthetic_results import BOTH, SHAPES, machine, synthetic, without

ROOT = BENCH.parent


# --- Pages ----------------------------------------------------------------------------------------


def test_the_pages_agree_with_the_committed_results():
    committed = store.load(BENCH / "results")
    assert [p.relative_to(ROOT).as_posix() for p in page.stale(ROOT, committed)] == []
    blocks = {name for p in page.pages(ROOT) for _, name, *_ in page.BLOCK.findall(p.read_text())}
    assert blocks == page.BLOCKS.keys()
    assert "<!-- table: price -->" in (ROOT / "README.md").read_text()


def test_the_tables_of_csv_and_json_agree():
    for committed in store.load(BENCH / "results"):
        for path in committed.folder.glob("*.json"):
            if path.name == store.FACTS:
                continue
            with path.with_suffix(".csv").open() as file:
                medians = [float(row["median_ms"]) for row in csv.DictReader(file)]
            expected = [1e3 * row.stats["median"] for row in results_.Results.load(path).rows]
            assert medians == pytest.approx(expected, abs=1e-6)


def test_a_page_with_another_figure_is_stale(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- table: price -->\n<!-- end of table -->\nafter\n")
    measured = [machine(synthetic())]
    assert page.stale(tmp_path, measured) == [path]
    path.write_text(page.fill(path.read_text(), measured))
    assert page.stale(tmp_path, measured) == []
    text = path.read_text()
    assert text.startswith("before\n<!-- table: price -->\n|  | Some CPU, float32: 2048 ")
    assert text.endswith("<!-- end of table -->\nafter\n")
    path.write_text(text.replace("**1.04**", "**1.03**"))
    assert page.stale(tmp_path, measured) == [path]
    assert page.stale(tmp_path, [machine(synthetic(boft_2_8=0.07))]) == [path]


def test_check_names_the_pages_that_differ(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("<!-- table: price -->\n<!-- end of table -->\n")
    monkeypatch.setattr(page, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"README\.md: not what bench/results gives"):
        page.main(["--check"])
    page.main([])
    page.main(["--check"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: cost -->\n<!-- end of table -->", "table: expected one of price, .* 'cost'"),
        ("<!-- table: price -->\n", "table: expected <!-- end of table -->"),
    ],
)
def test_blocks_that_cannot_be_written(text, message):
    with pytest.raises(ValueError, match=message):
        page.fill(text, [])


# --- Prices ---------------------------------------------------------------------------------------


def rows_of(block):
    """Read the cells of a block's table, by the first cell of their row."""
    cells = [line.strip("| ").split(" | ") for line in block if line.startswith("| ")]
    return {row[0].strip("*"): row[1:] for row in cells}


def on_gpu():
    content = synthetic()
    content["machine_info"] |= {"device": "Some GPU", "dtype": "bf16"}
    return machine(content)


def test_prices_have_time_and_memory_of_a_typical_shape():
    content = without(synthetic(boft_2_8=0.05), lambda info: info["contestant"] == "more")
    for entry in content["benchmarks"]:
        if entry["extra_info"]["contestant"] == "lora-r16":
            entry["extra_info"]["saved_bytes"] = 3 << 20
    lines = list(prices.price([machine(content), on_gpu()]))
    assert lines[0] == (
        "|  | Some CPU, float32: 2048 → 2048 with 1024 rows |  "
        "| Some GPU, bfloat16: 4096 → 4096 with 8192 rows |  |"
    )
    rows = rows_of(lines)
    assert rows["frozen `nn.Linear`"][:2] == ["1 (12 ms)", "0.0 MiB"]
    assert rows["BOFT(2,8), boft_ops"][0] == "**1.05**"
    assert rows["LoRA r=16, PEFT"][:2] == ["1.10", "3.0 MiB"]
    assert rows["BOFT b=8, LyCORIS"][:3] == ["not measured", "", "not measured"]
    # At the shape of a GPU nothing was measured here. A rival without any figure is left out.
    assert rows["LoRA r=16, PEFT"][2] == "not measured"
    assert "PSOFT, PEFT" in rows
    assert "Monarch (MoRe)" not in rows
    assert "Some GPU: bfloat16, torch 2.13" in lines[-1]


def test_prices_of_several_shapes_are_medians_over_the_frozen_layer():
    large = str(contestants.Shape(4096, 4096, 512))
    content = without(
        synthetic(boft_2_8=[0.04, 0.3, 0.05]),
        lambda info: info["contestant"] == "more" or info["group"] == large,
    )
    rows = rows_of(prices.shapes([machine(content), on_gpu()]))
    assert rows["frozen layer, ms"] == ["- / 12 / 12 / -", "12 / 12 / 12 / -"]
    assert rows["BOFT(2,8), boft_ops"] == ["- / 1.05 / 1.05 / -", "1.04 / 1.04 / 1.04 / -"]
    assert rows["BOFT b=8, PEFT 0.21: m = 1"][0] == "- / 31.0 / 31.0 / -"
    assert rows["Monarch (MoRe)"] == ["not measured", "2.50 / 2.50 / 2.50 / -"]


def test_wins_and_losses_are_told_apart():
    content = synthetic(boft_2_8=[0.05, 0.11, 0.2], lora_r16=0.1)
    for entry in content["benchmarks"]:
        info, data = entry["extra_info"], entry["stats"]["data"]
        if (info["contestant"], info["group"]) == ("boft-2-8", "768x768x512"):
            data[:] = [0.5 * value for value in data]
        if (info["contestant"], info["group"]) == ("boft-2-8", "4096x4096x512"):
            data[:] = [2 * value for value in data]
    model = {"suite": "model", "group": "Llama", "direction": "training step"}
    for name, factor in (("lora-r16", 1.0), ("boft-2-8", 0.9)):
        stats = {"data": [factor, 2 * factor], "median": factor, "q1": factor, "q3": factor}
        info = model | {"contestant": name, "rounds": [0, 1]}
        content["benchmarks"].append({"extra_info": info, "stats": stats})
    assert list(prices.wins([machine(content)])) == [
        "- Some CPU: faster at 768x768x512 (0.50); slower at 4096x4096x512 (2.02); "
        "not separable at 768x3072x512 (1.01), 2048x2048x1024 (1.01).",
        "- Some CPU, a training step of Llama: 0.90 [0.90, 0.90].",
    ]
    (sentence,) = prices.headline([machine(content)])
    assert "as those of LoRA r=16: 0.50 to 2.02 on an Some CPU. The ranges" in sentence


def figure(section, part, name, values):
    """Make the line of a contestant of gpu_decide.py."""
    line = {"kind": "figure", "section": section, "part": part, "name": name, "label": name}
    return line | {"unit": "s", "rounds": [*range(len(values))], "values": values}


def test_a_gpu_is_judged_by_its_later_run():
    facts = {"kind": "facts", "section": "ceilings", "part": "environment", "device": "Some GPU"}
    facts |= {"dtype": "bfloat16", "torch": "2.11", "triton": "3.6", "peft": "0.21"}
    facts |= {"cpu": "Some CPU", "python": "3.12"}
    decided = [
        facts | {"commit": {"id": "aaaaaaa"}},
        figure("layers", "4096x4096x8192", "linear", [1.0, 1.0]),
        figure("layers", "4096x4096x8192", "lora-r16", [2.0, 2.0]),
        figure("layers", "4096x4096x8192", "boft-2-8", [1.5, 1.5]),
        figure("steps", "4096x4096x8192", "lora-r16", [1.0, 1.0]),
        figure("steps", "4096x4096x8192", "input side", [1.25, 1.25]),
        {"kind": "section", "section": "layers", "outcome": "done", "commit": "bbbbbbb"},
    ]
    older = on_gpu().runs[0]
    machines_ = [machine(older, decided=decided)]
    rows = rows_of(prices.price(machines_))
    assert rows["BOFT(2,8), boft_ops"][0] == "**1.50**"
    lines = list(prices.price(machines_))
    assert "¹ Measured at an earlier commit than the times, 012345678." in lines
    assert lines[-1].endswith("Some GPU: bfloat16, torch 2.11, PEFT 0.21, commit bbbbbbb.")
    assert list(prices.wins(machines_)) == [
        "- Some GPU: faster at 4096x4096x8192 (0.75).",
        "- Some GPU, the device alone (a replayed CUDA graph): 4096x4096x8192 (1.25).",
    ]
    text = "\n".join(page.results(machines_))
    assert "| layers, 4096x4096x8192: boft-2-8 |" in text
    # the older run adds only what was not measured again
    assert "### Some GPU, bf16: memory" in text
    assert "#### Overhead" not in text
    assert "#### Goals" not in text


def test_single_kernels_and_their_tiles_stand_on_another_page():
    facts = {"kind": "facts", "section": "ceilings", "part": "environment", "device": "Some GPU"}
    facts |= {"dtype": "bfloat16", "torch": "2.11", "triton": "3.6", "peft": "0.21"}
    facts |= {"cpu": "Some CPU", "python": "3.12", "commit": {"id": "aaaaaaa"}}
    tiles = "rotate, groups of 16: tiles"
    error = figure("errors", "rotate, groups of 16", "triton rows=32", [0.5, 0.5]) | {"unit": "1"}
    lines = [
        facts,
        figure("ceilings", "launches", "add", [1.0, 1.0]),
        figure("kernels", "rotate, groups of 16", "triton", [1.0, 1.0]),
        figure("kernels", tiles, "triton", [1.0, 1.0]),
        figure("kernels", tiles, "triton rows=32", [0.9, 0.9]),
        error,
    ]
    text = "\n".join(decide_page.section(lines))
    assert "| ceilings, launches: add |" in text
    assert "[How the kernels work](kernels.md#on-an-h200)" in text
    assert "| kernels, " not in text
    assert "rows=32" not in text


def test_the_note_to_peft_has_every_shape_with_quartiles():
    lines = list(prices.upstream([machine(synthetic(boft_2_8=[0.04, 0.06, 0.08]))]))
    assert lines[0].startswith(
        "**Some CPU: float32, 2 threads, torch 2.13, PEFT 0.21, commit 01234567"
    )
    rows = rows_of(lines)
    assert rows["BOFT(2,8), this package"] == ["1.06 [1.05, 1.07]"] * len(SHAPES)
    assert rows["LoRA r=16, PEFT"] == ["1.10 [1.10, 1.10]"] * len(SHAPES)


# --- Machines -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpu", "name", "folder"),
    [
        ("AMD EPYC (family 25, model 17)", "AMD EPYC (Zen 4)", "amd-epyc-zen-4"),
        ("AMD EPYC (family 26, model 2)", "AMD EPYC (Zen 5)", "amd-epyc-zen-5"),
        ("AMD EPYC 7763 64-Core Processor (family 25, model 1)", "AMD EPYC (Zen 3)", None),
        (
            "Intel(R) Xeon(R) Processor (family 6, model 207)",
            "Intel Xeon (Emerald Rapids)",
            "intel-xeon-emerald-rapids",
        ),
        (
            "Some CPU (family 1, model 2)",
            "Some CPU (family 1, model 2)",
            "some-cpu-family-1-model-2",
        ),
        ("AMD EPYC (family 99, model 2)", "AMD EPYC (family 99, model 2)", None),
        ("aarch64", "aarch64", "aarch64"),
    ],
)
def test_machines_are_named_by_the_generation_of_their_cpu(cpu, name, folder):
    facts = {"device": "cpu", "cpu": cpu}
    assert machines.machine_name(facts) == name
    assert folder in (None, machines.folder_name(facts))
    assert machines.machine_name(facts | {"device": "NVIDIA H200"}) == "NVIDIA H200"


def test_machines_lie_beside_each_other(tmp_path):
    for cpu in ("AMD EPYC (family 26, model 2)", "AMD EPYC (family 25, model 17)"):
        content = synthetic()
        content["machine_info"]["cpu"] = cpu
        result = results_.Results(content)
        folder = tmp_path / machines.folder_name(result.machine)
        run.write(result, results_.text_of(content), folder)
    loaded = store.load(tmp_path)
    assert [m.name for m in loaded] == ["AMD EPYC (Zen 4)", "AMD EPYC (Zen 5)"]
    text = "\n".join(page.results(loaded))
    assert text.index("### AMD EPYC (Zen 4), fp32") < text.index("### AMD EPYC (Zen 5), fp32")
    columns = next(line for line in prices.shapes(loaded) if line.startswith("|"))
    assert columns == "|  | AMD EPYC (Zen 4) | AMD EPYC (Zen 5) |"


def test_results_are_stored_without_loss():
    content = synthetic()
    stored = json.loads(results_.text_of(content))
    assert stored["machine_info"] == content["machine_info"]
    pairs = zip(stored["benchmarks"], content["benchmarks"], strict=True)
    assert all(one == {k: other[k] for k in ("extra_info", "stats")} for one, other in pairs)


def test_everything_of_a_machine_is_one_command(tmp_path, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(run, "run", lambda options: results_.text_of(synthetic()))
    monkeypatch.setattr(run.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(page, "FOLDER", tmp_path / "bench" / "results")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table: price -->\n<!-- end of table -->\n")
    run.main(["--everything"])
    assert [command[-1].name for command in commands] == ["peft_model.py", "indexed.py"]
    (written,) = page.FOLDER.glob("*/auto.json")
    assert written.parent.name == "some-cpu"
    assert "Some CPU, float32" in readme.read_text()
    assert run.arguments(["--everything"]).extras == "compiled-boft,lycoris-boft"
    with pytest.raises(SystemExit):
        run.arguments(["--everything", "--shapes=768x768x512"])
    assert "--everything: expected no --shapes, --out or --device" in capsys.readouterr().err


# --- The end of `pytest bench/` -------------------------------------------------------------------


def test_summary_has_prices_memory_and_verdicts():
    content = synthetic(boft_2_8=0.06)
    lines = list(summary.lines(results_.Results(content), width=200))
    text = "\n".join(lines)
    first = lines.index(next(line for line in lines if "<boft-2-8>" in line))
    assert lines[first].split() == ["<boft-2-8>"] + ["+6.0", "%"] * len(SHAPES)
    against = lines[lines.index(next(x for x in lines if x.startswith("time of LoRA"))) :]
    ours = next(line for line in against if "<boft-2-8>" in line)
    assert ours.split() == ["<boft-2-8>"] + [f"{1.06 / 1.1:.2f}"] * len(SHAPES)
    assert "0.0 / 0.0" in text
    assert "not met: BOFT(2,8), forward+backward: overhead at most half of PEFT LoRA" in text
    assert "met: BOFT(4,4), forward+backward: overhead at most that of PEFT LoRA" in text
    narrow = list(summary.lines(results_.Results(content), width=80))
    assert max(len(line) for line in narrow if not line.startswith(("    ", "met", "not"))) <= 80
    nothing = without(content, lambda info: info["direction"] == BOTH or info["suite"] == "ops")
    assert list(summary.lines(results_.Results(nothing), 80)) == [
        "No verdict: each needs more than what was measured."
    ]


class Item:
    """A collected benchmark, with its parameters."""

    def __init__(self, **params):
        self.callspec = type("CallSpec", (), {"params": params})


def test_the_length_is_known_before():
    large, small = str(SHAPES[0]), str(contestants.SMALL_SHAPES[0])
    items = [
        Item(shape=shape, direction=direction, name=name)
        for shape in (large, small)
        for direction in ("forward", BOTH)
        for name in ("linear", "lora-r16")
    ]
    around = recording.SECONDS_AROUND
    assert recording.expected_seconds(items, 8.0) == 8 + 4 + around + 2 + 1
    operators = [Item(group="g", direction="forward", name=name) for name in ("a", "b")]
    assert recording.expected_seconds(operators, 8.0) == pytest.approx(0.8)
    assert recording.expected_seconds([Item(model="tiny", contestant="x")], 8.0) == 8 + around
