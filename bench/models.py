"""A whole model, finetuned in several ways: one training step of each, on random weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import NamedTuple

import peft
import torch
from peers import forgo_extension
from torch import nn

import boft_ops

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BUTTERFLY = {"n_factors": 2, "block_size": 8}


class Architecture(NamedTuple):
    """A model of the Llama architecture, and what it is trained on."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length


MODELS = {
    "tiny": Architecture(64, 128, 2, 4, 2, 256, 1, 16),  # to see that all of it works
    "small": Architecture(512, 1536, 4, 8, 4, 4096, 1, 256),
    "quarter": Architecture(2048, 8192, 4, 32, 8, 32000, 2, 2048),  # of the layers of the next
    "1b": Architecture(2048, 8192, 16, 32, 8, 32000, 2, 2048),  # that of Llama-3.2-1B
}
LABELS = {
    "lora-r16": "PEFT LoRA r=16",
    "peft-oft": "PEFT OFT b=8 (default)",
    "peft-boft": "PEFT BOFT",
    "boft-2-8": "BOFT(2,8)",
}


def group(name: str) -> str:
    """What results call a model."""
    a = MODELS[name]
    return f"Llama {name}, {a.layers} layers of {a.hidden}, {a.batch}x{a.length} tokens"


def default_model(device: torch.device) -> str:
    return "small" if device.type == "cpu" else "1b"


def base(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The frozen model that all contestants share the weights of."""
    from transformers import LlamaConfig, LlamaForCausalLM

    a = MODELS[name]
    config = LlamaConfig(
        hidden_size=a.hidden,
        intermediate_size=a.inner,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        vocab_size=a.vocabulary,
        max_position_embeddings=a.length,
        use_cache=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:  # made where it is to be: random numbers of 1e9 weights take a CPU a minute
            return LlamaForCausalLM(config).requires_grad_(False).train()
    finally:
        torch.set_default_dtype(before)


def build(name: str, model: nn.Module) -> nn.Module:
    """The model with adapters, over the same weights."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    if name == "boft-2-8":
        return boft_ops.adapt(model, TARGETS, **BUTTERFLY)
    forgo_extension()
    config = {
        "lora-r16": lambda **more: peft.LoraConfig(r=16, lora_alpha=16, **more),
        "peft-oft": lambda **more: peft.OFTConfig(
            r=0, oft_block_size=8, use_cayley_neumann=True, **more
        ),
        "peft-boft": lambda **more: peft.BOFTConfig(
            boft_block_size=8, boft_n_butterfly_factor=2, **more
        ),
    }[name](target_modules=list(TARGETS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PEFT's extension was not built
        return peft.inject_adapter_in_model(config, model)


def label(name: str, model: nn.Module) -> str:
    """What tables call a contestant: of PEFT's BOFT with the m that it made of 2."""
    if name != "peft-boft":
        return LABELS[name]
    found = (m.boft_R["default"].shape for m in model.modules() if hasattr(m, "boft_R"))
    m, _, b, _ = next(found)
    return f"{LABELS[name]}({m},{b})"


def training_step(model: nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Forward, loss, backward and AdamW; returns the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> torch.Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def text(name: str, device: torch.device) -> torch.Tensor:
    """Random token ids."""
    a = MODELS[name]
    generator = torch.Generator().manual_seed(4)
    return torch.randint(a.vocabulary, (a.batch, a.length), generator=generator).to(device)
