#!/usr/bin/env python3
"""Finetune a mixture of experts: rotate the inputs of its experts and of its attention.

    python docs/examples/moe.py                        # a small one, in about a minute
    python docs/examples/moe.py --experts shared       # one rotation for all experts
    python docs/examples/moe.py --model mistralai/Mixtral-8x7B-v0.1 --text mine.txt

Without --model there is nothing to download: a Mixtral of 0.3 M parameters learns
English from this repository's pages, byte by byte. Then it is frozen, and rotations
alone adapt it to Python, from the repository's modules.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
)

import boft_ops

ROOT = Path(__file__).resolve().parents[2]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Named as for PEFT's target_parameters: the 3-D weights of all experts of a layer.
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def adapt(model: nn.Module, experts: str) -> nn.Module:
    """Freeze the model and put rotations in front of its attention and experts."""
    # Without a scale a rotation costs no activation memory but the rows themselves.
    return boft_ops.adapt(
        model,
        ATTENTION,
        target_parameters=EXPERTS,
        experts=experts,
        block_size=8,
        n_factors=2,
        scale=False,
    )


def train(model: nn.Module, tokens: torch.Tensor, args, lr: float) -> None:
    """Take steps with AdamW over random windows of the tokens."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # No weight decay: it would pull the rotations to the identity.
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(args.steps):
        most = len(tokens) - args.length
        starts = torch.randint(most, (args.batch,), generator=generator)
        batch = torch.stack([tokens[i : i + args.length] for i in starts.tolist()])
        batch = batch.to(model.device)
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def loss_of(model: nn.Module, tokens: torch.Tensor, args) -> float:
    """The mean loss over neighboring windows of the tokens."""
    count = min(64, len(tokens) // args.length)
    windows = tokens[: count * args.length].view(count, args.length)
    windows = windows.to(model.device)
    return float(model(input_ids=windows, labels=windows).loss)


def small_model() -> MixtralForCausalLM:
    """A Mixtral of bytes: two layers of four experts, of which two serve a token."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return MixtralForCausalLM(config)


def bytes_of(paths: list[Path]) -> torch.Tensor:
    """The bytes of files, one after the other, as tokens."""
    text = b"\n".join(path.read_bytes() for path in paths)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def prepare(args) -> tuple[nn.Module, torch.Tensor]:
    """A pretrained model, and the tokens to finetune it on."""
    if args.model is None:
        model = small_model()
        train(model, bytes_of(sorted((ROOT / "docs").glob("*.md"))), args, lr=3e-3)
        return model, bytes_of(sorted((ROOT / "boft_ops").rglob("*.py")))
    if args.text is None:
        raise SystemExit("moe: --model needs a --text to finetune it on")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = tokenizer(args.text.read_text(), return_tensors="pt").input_ids[0]
    return model, tokens


def run(args) -> dict[str, float]:
    """Finetune, save and merge; returns the losses on text that was held out."""
    model, tokens = prepare(args)
    cut = len(tokens) * 9 // 10
    training, held_out = tokens[:cut], tokens[cut:]
    losses = {"pretrained": loss_of(model, held_out, args)}

    adapt(model, args.experts)
    counts = {flag: 0 for flag in (True, False)}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    print(f"{counts[True]} numbers are trained, {counts[False]} are frozen")
    train(model, training, args, lr=args.lr)
    losses["finetuned"] = loss_of(model, held_out, args)

    # The adapter is one small file. load_adapter puts it into the pretrained model.
    boft_ops.save_adapter(model, args.out)
    # Merged weights have the shapes of the pretrained ones: serving knows no rotations.
    boft_ops.merge(model)
    losses["merged"] = loss_of(model, held_out, args)
    for name, loss in losses.items():
        print(f"{name:10} {loss:.3f}")
    return losses


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a mixture of experts of transformers")
    parser.add_argument("--text", type=Path, help="a file to finetune --model on")
    parser.add_argument("--experts", choices=("each", "shared"), default="each")
    parser.add_argument("--out", type=Path, default=Path("moe.safetensors"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens of a window")
    parser.add_argument("--lr", type=float, default=5e-3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(parse())
