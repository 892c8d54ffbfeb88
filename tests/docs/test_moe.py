"""The recipe docs/examples/moe.py, at a small size."""

import importlib.util
from pathlib import Path

import pytest
import torch

import boft_ops

PATH = Path(__file__).resolve().parents[2] / "docs" / "examples" / "moe.py"
spec = importlib.util.spec_from_file_location("moe_recipe", PATH)
moe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(moe)


@pytest.mark.parametrize("experts", ["each", "shared"])
def test_it_learns_saves_and_merges(experts, tmp_path, capsys):
    out = tmp_path / "adapter.safetensors"
    # The texts are files of this repository, and how much is learned of them changes with these.
    args = moe.parse(
        [*["--experts", experts, "--out", str(out)], "--steps=80", "--batch=4", "--length=32"]
    )
    losses = moe.run(args)
    assert losses["finetuned"] < losses["pretrained"] - 0.05
    assert losses["merged"] == pytest.approx(losses["finetuned"], abs=1e-4)
    assert "numbers are trained" in capsys.readouterr().out
    model, tokens = moe.prepare(args)  # the same pretrained model once more
    held_out = tokens[len(tokens) * 9 // 10 :]
    assert moe.loss_of(model, held_out, args) == pytest.approx(losses["pretrained"], abs=1e-4)
    boft_ops.load_adapter(model, out)
    assert moe.loss_of(model, held_out, args) == pytest.approx(losses["finetuned"], abs=1e-4)
    (layer, *_) = [m for m in model.modules() if isinstance(m, boft_ops.BOFTExperts)]
    shape = (4, 2, 8, 28) if experts == "each" else (2, 8, 28)
    assert torch.count_nonzero(layer.gate_up_proj.skew) > 0
    assert layer.gate_up_proj.skew.shape == shape


def test_a_model_needs_a_text():
    with pytest.raises(SystemExit, match="needs a --text"):
        moe.run(moe.parse(["--model", "some/model"]))
