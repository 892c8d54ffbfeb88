"""The figures in sentences: each is computed, and comes from where its page says."""

import json
import re

import pytest
from bench_modules import (
    BENCH,
    contestants,
    decide_lines,
    figures,
    gpu_decide,
    interleave,
    page,
    prices,
    sizes,
    store,
)

from boft_ops.ops import rotated_linear

ROOT = BENCH.parent
TUNING = ROOT / "docs" / "tuning.md"
HOST = ("host-native", "host-triton")
OTHER_BOFTS = ("peft-boft", "peft-boft-activation", "lycoris-boft", "compiled-boft")


@pytest.fixture(scope="module")
def committed():
    return store.load(BENCH / "results")


def test_every_figure_stands_in_a_page():
    """All pages are compared by test_the_pages_agree_with_the_committed_results."""
    used = {name for p in page.pages(ROOT) for name, _ in figures.MARK.findall(p.read_text())}
    assert used == figures.FIGURES.keys()


def test_a_page_with_another_figure_is_stale(tmp_path, committed):
    path = tmp_path / "CONTRIBUTING.md"
    path.write_text("| from <!-- figure: fused-rows -->64<!-- /figure --> rows on |\n")
    assert page.stale(tmp_path, committed) == [path]
    path.write_text(page.filled(path, committed))
    rows = rotated_linear.MIN_ROWS
    assert f"<!-- figure: fused-rows -->{rows}<!-- /figure --> rows on" in path.read_text()
    assert page.stale(tmp_path, committed) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A <!-- figure: x -->1<!-- /figure -->", r"page\.md: figure: expected one of .* got 'x'"),
        ("A <!-- figure: fused-rows -->1 row", "figure: expected <!-- /figure --> after each"),
        ("A <!-- figure: fused-rows -->1\n<!-- /figure -->", "figure: expected <!-- /figure -->"),
        ("- <!-- figure: fused-rows -->1<!-- /figure -->", "figure: expected a word before it"),
        ("2. <!-- figure: fused-rows -->1<!-- /figure -->", "figure: expected a word before it"),
    ],
)
def test_figures_that_cannot_be_written(text, message, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        page.filled(path, [])


def test_figures_are_those_of_the_raw_results(committed):
    """Two of them, by another way than the page's."""
    machine = next(m for m in committed if m.folder.name == figures.GPU)
    lines = [json.loads(line) for line in (machine.folder / "decide.jsonl").open()]
    medians = {
        (line["section"], line["part"], line["name"]): line["median"]
        for line in lines
        if line["kind"] == "figure"
    }
    text = {name: figures.FIGURES[name](committed) for name in figures.FIGURES}
    assert float(text["h200-copy-us"]) == pytest.approx(1e6 * medians[figures.COPY], abs=0.06)
    native = medians["host", "enqueued, 4096x4096x16", "boft-2-8"]
    assert float(text["h200-host-native-us"]) == pytest.approx(1e6 * native, abs=0.6)
    low, high = map(float, text["h200-of-lora"].split(" to "))
    assert 0 < low < high
    assert all(re.search(r"\d", one) for one in text.values())


def test_what_pages_say_in_words_holds(committed):
    """Statements without a figure: if one fails, the page that is named has to say otherwise."""
    boft, lora = prices.BOFT, contestants.LORA
    machines = {machine.folder.name: machine for machine in committed}
    gpu, cpus = machines[figures.GPU], [machine for machine in committed if machine.on_cpu]
    # README.md: the device alone is faster with LoRA at all shapes but the largest
    alone = gpu.device_alone(prices.OUR_SIDE, lora)
    assert {shape for shape, (ratio, *_) in alone.items() if ratio < 1} == {str(contestants.BULK)}
    # README.md: BOFT(2, 8) is faster than LoRA by the clock at nearly all measured shapes
    measured = [(m, contestants.Shape.parse(text)) for m in committed for text in m.steps]
    faster = [m.ratio(shape, boft, lora)[2] < 1 for m, shape in measured]
    assert sum(faster) >= 0.8 * len(faster)
    # README.md: the fastest other BOFT is plain PyTorch under torch.compile
    for shape in prices.ON_CPU[1:]:
        times = {name: machines[figures.ZEN_5].ratio(shape, name)[0] for name in OTHER_BOFTS}
        assert min(times, key=times.get) == contestants.COMPILED
    # docs/linear.md: the fused product takes less time than that of the BLAS
    for machine in cpus:
        for direction, blas in (("forward", "f-linear"), ("backward", "grad-weight")):
            rows = machine.main.table(sizes.CPU.linear, direction)
            times = {row.name: row.by_round for row in rows}
            assert interleave.summary(interleave.ratios(times, "boft-linear", blas))[2] < 1
    text = {name: float(figures.FIGURES[f"h200-{name}-us"](committed)) for name in HOST}
    # docs/cuda.md: the native call takes the host half the time of Triton's launches
    assert 0.4 < text["host-native"] / text["host-triton"] < 0.6
    steps, kernels = (
        {(f.part, f.name): f.quartiles[0] for f in decide_lines.figures(gpu.decided)
         if f.section == section}
        for section in ("steps", "kernels")
    )  # fmt: skip
    # docs/kernels.md: rotating the weight takes hardly less time
    bulk = str(contestants.BULK)
    assert 0.95 < steps[bulk, "weight side"] / steps[bulk, prices.OUR_SIDE] < 1
    # docs/choosing.md: a GPU rotates groups of 16 and of 64 in the same time
    small, large = (f"rotate, groups of {size}, {figures.ROWS}" for size in (16, 64))
    assert kernels[large, "triton"] / kernels[small, "triton"] == pytest.approx(1, abs=0.03)
    # docs/tuning.md: make gpu-decide takes 8.5 minutes
    assert "make gpu-decide                    # 8.5 minutes" in TUNING.read_text()
    assert gpu_decide.arguments(["--out", "x"]).minutes == 8.5


@pytest.mark.parametrize("name", ["h200-copy-us", "zen-5-copies", "h200-tests"])
def test_a_figure_without_its_results_raises(name):
    with pytest.raises(ValueError, match="bench/results: expected a folder "):
        figures.FIGURES[name]([])


def test_a_quotation_that_has_gone_raises():
    quoted = figures.quoted("docs/examples/merging.md", "no such line (.)")
    with pytest.raises(ValueError, match=r"merging\.md: expected 'no such line \(\.\)' once, got"):
        quoted([])
