"""Training step of a whole PEFT model: accelerated BOFT against stock BOFT and LoRA r=16.

python bench/peft_model.py            writes bench/results/<machine>/models/peft.json
python bench/peft_model.py --smoke    runs a tiny model, prints, writes nothing

The model is a BERT encoder with random weights: 6 layers of 768 features, with adapters on all 36
linear layers. The batch has four sequences of 128 tokens. A step is forward, loss, backward and
AdamW. Before the measurement, accelerated and stock BOFT are checked to agree. The steps of the
three models are interleaved.

This estimate was written before the first run. Forward and backward of the frozen model take about
90 GFLOP, about a second on two cores. LoRA adds 4 small products to each layer and takes 1.1 times
that. Stock BOFT multiplies dense d x d matrices, mostly for d = 3072. It takes 375 GFLOP in each of
the six layers, or 15 to 25 seconds. Accelerated BOFT reads the activations slightly more often and
takes 1.0 times the frozen model. It should therefore be 15 to 25 times as fast as stock BOFT and
take 0.9 of LoRA's time.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import environment
import peft
import torch
from interleave import Contestant, measure, ratios, summary
from machines import folder_name
from memory import settle_heap
from transformers import BertConfig, BertModel

from boft_ops.interop.peft import accelerate

TARGETS = ["query", "key", "value", "dense"]
STOCK, OURS, LORA = "peft-boft", "accelerated-boft", "lora-r16"
GOALS = ((STOCK, 1 / 3), (LORA, 1.0))  # largest allowed time of OURS, divided by theirs


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and its batch, and limits of the measurement."""

    layers: int = 6
    features: int = 768
    heads: int = 12
    sequences: int = 4
    tokens: int = 128
    rounds: int = 20
    seconds: float = 40.0


SMOKE = Sizes(layers=1, features=32, heads=2, sequences=2, tokens=8, rounds=2, seconds=0.0)


class Step:
    """A training step of a model, which can be called any number of times."""

    def __init__(self, model: torch.nn.Module, sizes: Sizes) -> None:
        self.model = model.train()
        generator = torch.Generator().manual_seed(3)
        shape = sizes.sequences, sizes.tokens
        self.ids = torch.randint(0, 512, shape, generator=generator)
        self.target = torch.randn(*shape, sizes.features, generator=generator)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def loss(self) -> torch.Tensor:
        """Compute the loss of the batch."""
        y = self.model(input_ids=self.ids).last_hidden_state
        return (y - self.target).square().mean()

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def build(sizes: Sizes) -> dict[str, torch.nn.Module]:
    """Build the three models with equal frozen weights and small random adapters."""
    torch.manual_seed(0)
    base = BertModel(
        BertConfig(
            vocab_size=512,
            hidden_size=sizes.features,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            intermediate_size=4 * sizes.features,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )
    boft = peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=1, target_modules=TARGETS)
    lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that its extension was not built
        stock = peft.get_peft_model(copy.deepcopy(base), boft)
    models = {LORA: peft.get_peft_model(base, lora), STOCK: stock}
    for model in models.values():
        generator = torch.Generator().manual_seed(1)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    models[OURS] = accelerate(copy.deepcopy(stock))
    return models


def check(ours: Step, stock: Step) -> None:
    """Compare losses and gradients of accelerated and stock BOFT.

    Raises:
        AssertionError: they differ.
    """
    for step in (ours, stock):
        step.loss().backward()
    torch.testing.assert_close(ours.loss(), stock.loss(), rtol=1e-4, atol=1e-5)
    theirs = dict(stock.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        if parameter.requires_grad:
            want = theirs[name].grad
            worst = 1e-3 * float(want.abs().max())
            torch.testing.assert_close(parameter.grad, want, rtol=1e-3, atol=worst, msg=name)
    for step in (ours, stock):
        step.optimizer.zero_grad()


def run(sizes: Sizes) -> dict:
    """Measure the models and return the content of a result file."""
    models = build(sizes)
    trainable = {
        n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in models.items()
    }
    steps = {name: Step(model, sizes) for name, model in models.items()}
    check(steps[OURS], steps[STOCK])
    durations = measure(
        [Contestant(name, step) for name, step in steps.items()],
        rounds=sizes.rounds,
        seconds=sizes.seconds,
    )
    return {
        "machine_info": environment.describe(torch.device("cpu")),
        "commit_info": environment.commit(),
        "sizes": vars(sizes),
        "trainable": trainable,
        "seconds": {name: list(rounds.values()) for name, rounds in durations.items()},
        "parts_of": {name: summary(ratios(durations, OURS, name)) for name in (STOCK, LORA)},
    }


def show(result: dict) -> None:
    """Print the times, the ratios and the verdicts on the goals."""
    for name, seconds in result["seconds"].items():
        middle, low, high = summary(seconds)
        print(f"{name:17} {middle:8.3f} s  [{low:.3f}, {high:.3f}], {len(seconds)} steps")
    for name, most in GOALS:
        middle, low, high = result["parts_of"][name]
        verdict = "met" if high <= most else "not met" if low > most else "open"
        print(
            f"{OURS} takes {middle:.3f} [{low:.3f}, {high:.3f}] of {name}'s time; "
            f"goal {most:.3f}: {verdict}"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--smoke", action="store_true", help="run a tiny model, print, and write nothing"
    )
    options = parser.parse_args(argv)
    if options.smoke:
        show(run(SMOKE))
        return
    settle_heap()
    result = run(Sizes())
    show(result)
    folder = Path(__file__).parent / "results" / folder_name(result["machine_info"])
    path = folder / "models" / "peft.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path.relative_to(environment.ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
