"""The table of docs/choosing.md: it is the script's, and its shapes are those of models."""

import csv
import importlib
from pathlib import Path

import pytest

from boft_ops.tune.workloads import MODELS

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def choosing(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("choosing")


def layers():
    with (DOCS / "models.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_script_writes_the_page_as_it_is(choosing, tmp_path, monkeypatch):
    before, start, rest = (DOCS / "choosing.md").read_text().partition("<!-- models -->\n")
    _, end, after = rest.partition("<!-- /models -->")
    page = tmp_path / "choosing.md"
    page.write_text(before + start + end + after)  # without the table
    monkeypatch.setattr(choosing, "PAGE", page)
    choosing.main()
    assert page.read_text() == (DOCS / "choosing.md").read_text()


def test_the_shapes_are_those_that_the_tuner_knows():
    shapes = {}
    for row in layers():
        shape = (int(row["inputs"]), int(row["outputs"]))
        shapes.setdefault((row["model"], row["shapes_of"]), set()).add(shape)
    named = {name for _, name in shapes} - {""}
    assert named >= {"llama-2-7b", "llama-3-8b", "sd-1.5"}
    for (model, name), found in shapes.items():
        assert not name or found == set(MODELS[name]), model


def test_the_count_is_that_of_an_adapted_model(choosing):
    """The paper's tables have it from a whole model that was adapted."""
    with (DOCS / "paper" / "outputs" / "tables.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["model"] == "Llama-2-7B" and r["m"]]
    assert rows
    llama = [row for row in layers() if row["model"] == "Llama-2-7B"]
    for row in rows:
        count = sum(choosing.trained(layer, int(row["m"]), int(row["b"])) for layer in llama)
        assert count == int(row["trained"])
