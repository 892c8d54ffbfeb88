"""The recipes of docs/examples, at a small size."""

import importlib.util
from pathlib import Path

import fetch_fashion_mnist
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_lists_all_recipes():
    page = (EXAMPLES / "recipes.md").read_text()
    for name in ("causal_lm", "vision", "unet", "moe", "finetune_minilm", "merge_two_tasks"):
        assert f"[{name}.py]({name}.py)" in page
        assert (EXAMPLES / f"{name}.py").is_file()


@pytest.mark.exhaustive
def test_causal_lm(tmp_path):
    module = recipe("causal_lm")
    losses = module.main(["--steps", "4", "--length", "64", "--out", str(tmp_path / "adapter")])
    assert len(losses) == 4
    assert losses[-1] < 0.7 * losses[0]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_causal_lm_of_a_tiny_model(tmp_path):
    """The same functions with random weights, for the tests that run every time."""
    import transformers

    module = recipe("causal_lm")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    model = module.add_adapter(transformers.LlamaForCausalLM(config))
    ids = torch.arange(3, 11)
    data = [{"input_ids": ids, "labels": ids}]
    losses = module.finetune(model, data, steps=12, rate=3e-2, out=tmp_path)
    assert losses[-1] < losses[0]
    assert (tmp_path / "adapter_config.json").is_file()


@pytest.mark.exhaustive
def test_vision():
    folder = fetch_fashion_mnist.find()
    if folder is None:
        pytest.skip("no Fashion-MNIST: Debian's package dataset-fashion-mnist was not to be had")
    module = recipe("vision")
    if not (folder / "train-images-idx3-ubyte.gz").is_file():
        read = module.read
        module.read = lambda folder, split, count: read(folder, "t10k", count)
    losses = module.main([str(folder), "--steps", "8", "--images", "64", "--tests", "64"])
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])


@pytest.mark.exhaustive
def test_unet(tmp_path, capsys):
    losses = recipe("unet").main(["--steps", "6", "--out", str(tmp_path / "a.safetensors")])
    assert len(losses) == 6
    assert (tmp_path / "a.safetensors").is_file()
    half = float(capsys.readouterr().out.rsplit(maxsplit=1)[-1])
    assert 0.3 < half < 0.7
