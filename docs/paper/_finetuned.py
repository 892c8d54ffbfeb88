"""The demo's classifier, finetuned in several ways, for the scripts that examine trained weights.

A recipe names the adapter, its options and the seed. The trained model is kept in build/paper, so
that several scripts can examine it without training it again. Delete that folder to train anew.
``quick`` replaces MiniLM and the movie reviews by a tiny random BERT and synthetic sentences. Tests
use it to run the same code in seconds; its numbers mean nothing.
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertModel

import boft_ops

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "examples"))  # for the modules of the demo
try:
    import methods
    import minilm
    import snippets
    import training
    from fetch_data import DATA_DIR, FILE_NAME
finally:
    sys.path.remove(str(ROOT / "docs" / "examples"))

KEPT = ROOT / "build" / "paper"


@dataclass(frozen=True)
class Recipe:
    """One way to finetune: PEFT's LoRA as in the demo, or ``boft_ops.adapt`` with options.

    Attributes:
        kind: "lora" or "boft".
        rate: learning rate.
        seed: seed of the head and of the order of sentences.
        options: arguments of ``boft_ops.adapt``.
    """

    kind: str
    rate: float
    seed: int = 0
    options: dict = field(default_factory=dict)


def boft(n_factors: int, block_size: int, rate: float, seed: int = 0, **options) -> Recipe:
    """Make a recipe for BOFT."""
    options = {"n_factors": n_factors, "block_size": block_size, **options}
    return Recipe("boft", rate, seed, options)


@dataclass(frozen=True)
class Task:
    """The demo's task: the upper half of the encoder, and its inputs in three splits."""

    top: BertModel
    training: minilm.Cached
    validation: minilm.Cached
    test: minilm.Cached
    epochs: int
    quick: bool


@dataclass(frozen=True)
class Finetuned:
    """A trained model, its training time in wall-clock seconds, and its accuracy."""

    model: nn.Module
    seconds: float
    train_accuracy: float
    correct: torch.Tensor  # boolean, for each test sentence

    @property
    def test_accuracy(self) -> float:
        """Share of the test sentences with a correct answer."""
        return self.correct.double().mean().item()


def load_task(quick: bool = False) -> Task:
    """Load the demo's task, or make a tiny one if ``quick``."""
    if quick:
        return _synthetic_task()
    if not (DATA_DIR / FILE_NAME).is_file():
        sys.exit(f"{DATA_DIR / FILE_NAME} is not there; run docs/examples/fetch_data.py first")
    tokenizer, bert = minilm.load_minilm()
    lower, top = minilm.cut_in_two(bert)
    path = KEPT / "hidden_states.pt"
    if not path.is_file():
        splits = snippets.make_splits(snippets.read_snippets(DATA_DIR / FILE_NAME))
        _save([_cached(tokenizer, lower, split) for split in splits], path)
    parts = [minilm.Cached(**part) for part in torch.load(path)]
    return Task(top, *parts, epochs=2, quick=False)


def finetuned(task: Task, recipe: Recipe) -> Finetuned:
    """Load the model of a recipe from build/paper, or train it if it is not there.

    Raises:
        ValueError: the file in build/paper has parameters that the recipe's model lacks.
    """
    model = build(task, recipe)
    key = json.dumps([asdict(recipe), task.epochs, len(task.training)], sort_keys=True)
    path = KEPT / f"{recipe.kind}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if task.quick or not path.is_file():
        kept = _train(task, recipe, model)
        if task.quick:
            return Finetuned(model, **{k: v for k, v in kept.items() if k != "state"})
        _save(kept, path)
    kept = torch.load(path)
    unknown = model.load_state_dict(kept.pop("state"), strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{path}: expected the parameters of {recipe}, got also {unknown}")
    return Finetuned(model.eval(), **kept)


def build(task: Task, recipe: Recipe) -> nn.Module:
    """Build the untrained model: the pretrained layers, a fresh head, and the adapter."""
    torch.manual_seed(recipe.seed)
    model = minilm.Classifier(task.top)
    model.encoder.requires_grad_(False)
    if recipe.kind == "lora":
        return methods.lora(model)
    return boft_ops.adapt(model, minilm.LINEARS, modules_to_save=["head"], **recipe.options)


def _train(task: Task, recipe: Recipe, model: nn.Module) -> dict:
    started = time.perf_counter()
    training.train(
        model,
        task.training,
        rate=recipe.rate,
        epochs=task.epochs,
        seed=recipe.seed,
        each_step=lambda *_: None,
    )
    seconds = time.perf_counter() - started
    model.eval()
    train_correct = minilm.predict(model, task.training) == task.training.labels
    test_correct = minilm.predict(model, task.test) == task.test.labels
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    print(f"{recipe}: {seconds:.0f} s, test accuracy {test_correct.double().mean():.3f}")
    return {
        "state": state,
        "seconds": seconds,
        "train_accuracy": train_correct.double().mean().item(),
        "correct": test_correct,
    }


def _cached(tokenizer, lower: nn.Module, split: snippets.Split) -> dict:
    hidden = [torch.empty(0)] * len(split)
    for index, states in minilm.run_lower(tokenizer, lower, split.texts):
        for i, state in zip(index, states, strict=True):
            hidden[i] = state
    return {"hidden": hidden, "labels": torch.tensor(split.labels)}


def _save(value: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The file is written under another name and renamed, so that an interrupted run leaves no
    # incomplete file.
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(value, partial)
    partial.replace(path)


def _synthetic_task() -> Task:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8,
        hidden_size=128,
        num_hidden_layers=minilm.N_TOP,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=16,
    )
    _, top = minilm.cut_in_two(BertModel(config, add_pooling_layer=False))
    direction = torch.randn(config.hidden_size)

    def split(size: int) -> minilm.Cached:
        labels = torch.arange(size) % 2
        shifts = (labels * 2 - 1).float().mul(0.3)[:, None] * direction
        hidden = [torch.randn(4 + i % 5, len(direction)) + shift for i, shift in enumerate(shifts)]
        return minilm.Cached(hidden, labels)

    return Task(top, split(96), split(32), split(64), epochs=2, quick=True)
