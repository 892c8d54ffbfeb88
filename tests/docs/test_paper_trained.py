"""The scripts of docs/paper on parameter counts and trained weights, and committed outputs."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch

PAPER = Path(__file__).resolve().parents[2] / "docs" / "paper"
sys.path.insert(0, str(PAPER))  # for the modules of the scripts
try:
    import _common
    import _finetuned
    import _page
    import dropout
    import interpolation
    import spectrum
    import stability
    import tables
finally:
    sys.path.remove(str(PAPER))


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread, because with tiny matrices more threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(script, folder, monkeypatch, *arguments):
    """Run a script with --quick, and return its rows."""
    name = script.__name__
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--out", str(folder), *arguments])
    page = PAPER / f"{name}.md"
    before = page.read_text()
    script.main()
    assert page.read_text() == before  # only a full run writes to the page
    assert "cpu_s" in (folder / f"{name}.log").read_text()
    return _common.read_csv(folder / f"{name}.csv")


def is_picture(path):
    text = path.read_text()
    return text.startswith("<?xml") and "</svg>" in text and "<text" in text


def shown(script):
    """Return the lines of a page between the marks of its table."""
    text = (PAPER / f"{script.__name__}.md").read_text()
    return re.search(r"<!-- \w+ -->\n(.*?)\n<!-- /", text, re.DOTALL)[1].split("\n")


# --- Parameter counts -----------------------------------------------------------------------------


def test_counts_of_the_tables(tmp_path, monkeypatch):
    rows = run(tables, tmp_path, monkeypatch)
    # Integers are the same on every machine.
    assert rows == _common.read_csv(_common.OUTPUTS / "tables.csv")
    assert shown(tables) == tables.table(rows)
    by_row = {(row["model"], row["method"]): row for row in rows}
    deberta = by_row["DeBERTaV3-base", "BOFT m=2, b=8"]
    # Each of the 12 blocks has four layers 768 x 768, one 768 x 3072 and one 3072 x 768. A layer
    # has 2 * 7 / 2 d rotation parameters and n scales.
    assert int(deberta["rotation"]) == 12 * 7 * (5 * 768 + 3072)
    assert int(deberta["trained"]) == int(deberta["rotation"]) + 12 * (5 * 768 + 3072)
    assert deberta["counted_as"] == "rotation + 2n"
    assert {row["counted_as"] for row in rows if row["model"] == tables.SD15} == {"no"}


def test_counts_that_no_choice_of_layers_gives():
    def row(m, b, printed):
        return {"m": m, "b": b, "printed": printed}

    # These are 7.5 X + Y, 6 X + Y and 7 X + Y with X = 10,000 and Y = 5,000.
    consistent = [row(1, 16, "0.080M"), row(4, 4, "0.065M"), row(2, 8, "0.075M")]
    assert tables.one_set_of_layers(consistent)
    assert not tables.one_set_of_layers([*consistent[:2], row(2, 8, "0.090M")])
    # Here Y would be negative.
    assert not tables.one_set_of_layers([row(1, 16, "0.080M"), row(4, 4, "0.060M")])


def test_a_wrong_count_is_noticed():
    rows = _common.read_csv(_common.OUTPUTS / "tables.csv")
    assert tables.check(rows) == {"1": True, "4": True, "5": False}
    rows[1]["counted_as"] = "rotation"
    with pytest.raises(AssertionError, match="table 1, DeBERTaV3-base: expected rotation"):
        tables.check(rows)
    assert tables.rounds_to(794_999, "0.79M", 0)
    assert not tables.rounds_to(795_000, "0.79M", 0)


# --- Trained weights ------------------------------------------------------------------------------


def test_spectrum(tmp_path, monkeypatch):
    rows = run(spectrum, tmp_path, monkeypatch)
    assert is_picture(tmp_path / "spectrum.svg")
    assert len(rows) == (len(spectrum.RECIPES) + 1) * 18
    for row in rows:  # every method changed the weights
        if row["method"] != spectrum.ROUNDING:
            assert float(row["distance"]) > 1e-4
    committed = _common.read_csv(_common.OUTPUTS / "spectrum.csv")
    assert shown(spectrum) == spectrum.table(committed)
    for data in (rows, committed):
        spectrum.check(data)
        scaled = [float(r["singular_values"]) for r in data if r["method"] == spectrum.SCALED]
        assert min(scaled) > 1e-4  # the trained scale changes them, as the page states
    next(row for row in rows if row["method"] == spectrum.EXACT)["angle"] = "1e-3"
    with pytest.raises(AssertionError, match="angle: expected BOFT"):
        spectrum.check(rows)


def test_interpolation(tmp_path, monkeypatch):
    rows = run(interpolation, tmp_path, monkeypatch)
    assert is_picture(tmp_path / "interpolation.svg")
    committed = _common.read_csv(_common.OUTPUTS / "interpolation.csv")
    assert shown(interpolation) == interpolation.table(committed)
    for data in (rows, committed):
        interpolation.check(data)
        stops = {}
        for row in data:
            stops.setdefault(row["way"], []).append(float(row["t"]))
        assert {len(ts) for ts in stops.values()} == {6}
        assert {(ts[0], ts[-1]) for ts in stops.values()} == {(1.0, 0.0)}
        # Only the straight line leaves the rotations and changes singular values between its ends.
        lost = [float(r["singular_values"]) for r in data if r["way"] == interpolation.LINE]
        assert max(lost[1:-1]) > 1e-5
    rows[3]["distance"] = "9"
    with pytest.raises(AssertionError, match="expected to end at the pretrained weights"):
        interpolation.check(rows)


def test_dropout(tmp_path, monkeypatch):
    rows = run(dropout, tmp_path, monkeypatch, "--seeds", "2")
    assert is_picture(tmp_path / "dropout.svg")
    assert [(row["seed"], row["p_block"]) for row in rows] == [
        (str(seed), str(share)) for seed in range(2) for share in dropout.SHARES
    ]
    assert all(float(r["difference"]) == 0 for r in rows if float(r["p_block"]) == 0)
    committed = _common.read_csv(_common.OUTPUTS / "dropout.csv")
    assert shown(dropout) == dropout.table(committed)
    # By hand: the mean over the seeds, and the error from the seeds and the sentences together.
    group = [
        {"difference": "0.01", "difference_error": "0.003"},
        {"difference": "0.03", "difference_error": "0.003"},
    ]
    assert dropout.difference(group) == pytest.approx((2.0, (1.0**2 + 0.3**2) ** 0.5))


def test_dropout_is_active_while_the_scripts_train():
    task = _finetuned.load_task(quick=True)
    plain = _finetuned.build(task, dropout.recipe(0.0, 0))
    dropped = _finetuned.build(task, dropout.recipe(0.5, 0))
    layer = next(m for m in dropped.modules() if hasattr(m, "dropout") and hasattr(m, "skew"))
    mask = layer.train().dropout.draw(layer.skew)
    assert sorted(mask.sum(1).tolist()) == [0, mask.shape[1] // 2]  # one factor, half its blocks
    # The head and the adapter are the same, so runs of one seed differ only by the dropout.
    for one, other in zip(plain.parameters(), dropped.parameters(), strict=True):
        assert torch.equal(one, other)


def test_stability(tmp_path, monkeypatch):
    rows = run(stability, tmp_path, monkeypatch)
    assert is_picture(tmp_path / "stability.svg")
    committed = _common.read_csv(_common.OUTPUTS / "stability.csv")
    assert shown(stability) == stability.table(committed)
    assert committed[-1]["step"] == str(stability.STEPS)
    for data in (rows, committed):
        stability.check(data)
        last = {row["case"]: float(row["method_error"]) for row in data}
        assert last["neumann5, fp32"] > 0.1  # the series no longer gives rotations
    worse = copy.deepcopy(rows)
    worse[0]["product_error"] = "1e-5"
    with pytest.raises(AssertionError, match="expected errors below 1e-06"):
        stability.check(worse)


def test_a_finetuned_model_is_kept_and_loaded_again(tmp_path, monkeypatch):
    task = _finetuned.load_task(quick=True)
    kept = _finetuned.Task(**{**vars(task), "quick": False})
    monkeypatch.setattr(_finetuned, "KEPT", tmp_path)
    recipe = _finetuned.boft(2, 8, 3e-3, scale=False)
    first = _finetuned.finetuned(kept, recipe)
    monkeypatch.setattr(_finetuned.training, "train", None)  # it must not be trained again
    again = _finetuned.finetuned(kept, recipe)
    assert (again.seconds, again.test_accuracy) == (first.seconds, first.test_accuracy)
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(TypeError):  # another recipe is another model
        _finetuned.finetuned(kept, _finetuned.boft(2, 8, 1e-3, scale=False))


def test_filling_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->\nold\n<!-- /x -->\nafter\n")
    _page.fill(page, "x", _page.table(["a", "b"], [["c", "1"]]))
    assert page.read_text() == (
        "before\n<!-- x -->\n| a | b |\n| --- | ---: |\n| c | 1 |\n<!-- /x -->\nafter\n"
    )
    with pytest.raises(ValueError, match=r"page\.md: expected <!-- y -->"):
        _page.fill(page, "y", [])
