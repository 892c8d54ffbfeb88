"""The scripts of docs/paper on tiny problems, and their committed outputs."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from boft_ops.analysis.approximation import butterfly_factors

PAPER = Path(__file__).resolve().parents[2] / "docs" / "paper"
OUTPUTS = PAPER / "outputs"
sys.path.insert(0, str(PAPER))  # for the modules of the scripts
try:
    import _common
    import _figure5
    import figure5
    import figure5_speed
    import theorem1
    import transmission
finally:
    sys.path.remove(str(PAPER))


def test_a_quick_run_must_name_its_output_folder():
    with pytest.raises(SystemExit, match="expected --out"):
        transmission.main(["--quick"])


def test_csv_round_trip(tmp_path):
    rows = [{"a": 1, "b": "x, y"}, {"a": 2.5, "b": ""}]
    _common.write_csv(tmp_path / "t.csv", rows)
    assert _common.read_csv(tmp_path / "t.csv") == [{"a": "1", "b": "x, y"}, {"a": "2.5", "b": ""}]


# --- Figure 5 -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.exhaustive
def test_figure5_in_portions(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(PAPER))  # the processes of the script inherit it
    arguments = ["--quick", "--jobs", "1", "--out", str(tmp_path), "--resume"]
    figure5.main([*arguments, "--most", "3"])
    assert "26 structures are left" in capsys.readouterr().out
    first = _common.read_csv(tmp_path / _figure5.DATA)
    figure5.main(arguments)
    assert capsys.readouterr().out.count(": holds") == 2
    rows = _common.read_csv(tmp_path / _figure5.DATA)
    assert all(row in rows for row in first)  # these structures were not measured again
    points = _figure5.read_points(tmp_path)
    for b in (2, 4, 8):
        errors = [points["boft", m, b].error for m in range(1, (64 // b).bit_length() + 1)]
        assert errors == sorted(errors, reverse=True)  # more factors approximate better
    for m, b in ((6, 2), (4, 4)):  # other starts, Adam and more sweeps give similar errors
        for method in ("boft-long", "boft-random", "boft-adam"):
            assert abs(points[method, m, b].error - points["boft", m, b].error) < 0.02
    ElementTree.parse(tmp_path / "figure5.svg")
    assert "cpu_s_of_all_structures" in (tmp_path / "figure5.log").read_text()


def test_figure5_low_rank_is_the_best_of_its_rank():
    rows = figure5.low_rank(16, (0,), 64)
    assert [row["parameters"] for row in rows] == [32, 64]
    target = figure5.random_orthogonal(16, 0) - torch.eye(16).double()
    u, s, vh = torch.linalg.svd(target)
    rest = target - u[:, :2] * s[:2] @ vh[:2]
    assert float(rows[1]["error"]) == pytest.approx(float(rest.square().sum() / 32), abs=1e-6)


def test_figure5_claims_can_fail():
    point = _figure5.Point(parameters=10, error=0.5, at_half=0.5, seeds=1, sweeps="50")
    structures = (*_figure5.BETTER[64], *_figure5.AS_GOOD[64])
    with pytest.raises(AssertionError, match="DOES NOT HOLD"):
        _figure5.check_claims({("boft", *s): point for s in structures}, 64)


def test_figure5_targets_are_orthogonal_and_differ():
    q = figure5.random_orthogonal(32, 3)
    torch.testing.assert_close(q @ q.T, torch.eye(32, dtype=torch.float64))
    assert not torch.equal(q, figure5.random_orthogonal(32, 4))


def test_figure5_speed(tmp_path):
    figure5_speed.main(["--quick", "--out", str(tmp_path)])
    rows = _common.read_csv(tmp_path / figure5_speed.DATA)
    assert {row["what"] for row in rows} == {"ascent sweep", "gradient step"}
    assert all(float(row["ours_ms"]) > 0 and float(row["dense_ms"]) > 0 for row in rows)


def test_figure5_dense_sweeps_agree():
    """If all factors are one stage, both versions visit them in the same order."""
    target = figure5.random_orthogonal(32, 0).float()
    factors = butterfly_factors(32, 4, 4)
    dense = figure5_speed.dense_sweeps(target, factors, 3)
    ours = figure5.approximate(target[None], factors, max_sweeps=3).errors[-1]
    assert dense == pytest.approx(float(ours), abs=1e-5)


# --- Theorem 1 and section 3 ----------------------------------------------------------------------


def test_theorem1(tmp_path, capsys):
    theorem1.main(["--quick", "--out", str(tmp_path)])
    assert "rotations represented to" in capsys.readouterr().out
    ElementTree.parse(tmp_path / "theorem1.svg")


def test_transmission(tmp_path, capsys):
    transmission.main(["--quick", "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("as in the paper") == 3
    for number in (2, 3, 4):
        ElementTree.parse(tmp_path / f"figure{number}.svg")


# --- Committed outputs ----------------------------------------------------------------------------


def test_committed_data_supports_the_claims():
    assert len(_figure5.check_claims(_figure5.read_points(OUTPUTS), 512)) == 2
    assert theorem1.check_claims(OUTPUTS)
    assert transmission.check_claims(OUTPUTS)


@pytest.mark.parametrize("module", [_figure5, theorem1])
def test_committed_figures_come_from_the_committed_data(module, tmp_path):
    for data in OUTPUTS.glob("*.csv"):
        (tmp_path / data.name).write_bytes(data.read_bytes())
    module.draw(tmp_path)
    (drawn,) = tmp_path.glob("*.svg")
    # Versions of matplotlib may differ in decimals, but not in the number of texts and curves.
    texts = (drawn.read_text(), (OUTPUTS / drawn.name).read_text())
    counts = [(text.count("<path"), text.count("<text"), text.count("<use")) for text in texts]
    assert counts[0] == counts[1]
