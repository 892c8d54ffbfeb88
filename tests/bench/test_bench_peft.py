"""The benchmark of a whole PEFT model, run with a tiny model."""

import pytest
import torch
from bench_modules import BENCH, peft_model, store

OURS, STOCK, LORA = peft_model.OURS, peft_model.STOCK, peft_model.LORA
pytestmark = pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension")


def test_smoke(capsys, monkeypatch):
    monkeypatch.setattr(peft_model.Path, "write_text", None)  # writing a file would fail
    peft_model.main(["--smoke"])
    output = capsys.readouterr().out
    for name in (OURS, STOCK, LORA):
        assert f"{name} " in output
    assert output.count("goal") == 2


def test_the_contestants():
    models = peft_model.build(peft_model.SMOKE)
    trained = {
        name: {n for n, p in model.named_parameters() if p.requires_grad}
        for name, model in models.items()
    }
    assert trained[OURS] == trained[STOCK]
    assert len(trained[OURS]) == 2 * 6  # R and s of all linear layers of the one block
    assert len(trained[LORA]) == 2 * 6
    forms = {type(m).__module__ for m in models[OURS].modules()}
    assert "boft_ops.interop.peft.boft" in forms
    assert "boft_ops.interop.peft.boft" not in {type(m).__module__ for m in models[STOCK].modules()}


def test_a_wrong_model_is_not_timed(monkeypatch):
    monkeypatch.setattr(peft_model, "measure", None)
    build = peft_model.build

    def spoiled(sizes):
        models = build(sizes)
        layer = next(m for m in models[OURS].modules() if hasattr(m, "boft_R"))
        with torch.no_grad():
            layer.boft_R["default"].mul_(1.5)
        return models

    monkeypatch.setattr(peft_model, "build", spoiled)
    with pytest.raises(AssertionError):
        peft_model.run(peft_model.SMOKE)


def test_committed_results():
    """The committed results meet the goals on every machine that was measured."""
    found = store.peft_models(store.load(BENCH / "results"))
    assert found
    for _, result in found:
        assert (result["sizes"]["layers"], result["sizes"]["features"]) == (6, 768)
        assert result["trainable"][OURS] == result["trainable"][STOCK]
        for name, most in peft_model.GOALS:
            assert result["parts_of"][name][0] <= most
