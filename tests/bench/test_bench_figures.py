"""The figures in sentences: each is computed, and comes from where its page says."""

import json
import re

import pytest
from bench_modules import BENCH, figures, page, store

from boft_ops.ops import rotated_linear

ROOT = BENCH.parent


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


@pytest.mark.parametrize("name", ["h200-copy-us", "zen-5-copies", "h200-tests"])
def test_a_figure_without_its_results_raises(name):
    with pytest.raises(ValueError, match="bench/results: expected a folder "):
        figures.FIGURES[name]([])


def test_a_quotation_that_has_gone_raises():
    quoted = figures.quoted("docs/examples/merging.md", "no such line (.)")
    with pytest.raises(ValueError, match=r"merging\.md: expected 'no such line \(\.\)' once, got"):
        quoted([])
