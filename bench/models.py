"""Training steps of a whole model with random weights, finetuned in several ways."""

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
    """Sizes of a model of the Llama architecture, and of its training batch."""

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
        """Number of tokens in a batch."""
        return self.batch * self.length


MODELS = {
    "tiny": Architecture(64, 128, 2, 4, 2, 256, 1, 16),  # for tests
    "small": Architecture(512, 1536, 4, 8, 4, 4096, 1, 256),
    "quarter": Architecture(2048, 8192, 4, 32, 8, 32000, 2, 2048),  # a quarter of the layers of 1b
    "1b": Architecture(2048, 8192, 16, 32, 8, 32000, 2, 2048),  # the layers of Llama-3.2-1B
}
LABELS = {
    "lora-r16": "PEFT LoRA r=16",
    "peft-oft": "PEFT OFT b=8 (default)",
    "peft-boft": "PEFT BOFT",
    "boft-2-8": "BOFT(2,8)",
}


def group(name: str) -> str:
    """Name of a model in results."""
    a = MODELS[name]
    return f"Llama {name}, {a.layers} layers of {a.hidden}, {a.batch}x{a.length} tokens"


def default_model(device: torch.device) -> str:
    """Name of the model that is measured on a device by default."""
    return "small" if device.type == "cpu" else "1b"


def base(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Make the frozen model whose weights all contestants share."""
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
        with device:  # a CPU would need a minute for the random numbers of 1e9 weights
            return LlamaForCausalLM(config).requires_grad_(False).train()
    finally:
        torch.set_default_dtype(before)


def build(name: str, model: nn.Module) -> nn.Module:
    """Copy a model, sharing its weights, and add the adapters of a contestant."""
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
        warnings.simplefilter("ignore")  # PEFT warns that its extension was not built
        return peft.inject_adapter_in_model(config, model)


def label(name: str, model: nn.Module) -> str:
    """Name of a contestant in tables. That of PEFT's BOFT has the m that PEFT made of 2."""
    if name != "peft-boft":
        return LABELS[name]
    shapes = (m.boft_R["default"].shape for m in model.modules() if hasattr(m, "boft_R"))
    m, _, b, _ = next(shapes)
    return f"{LABELS[name]}({m},{b})"


def training_step(model: nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function that runs forward, loss, backward and AdamW, and returns the loss."""
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
    """Make a batch of random token ids, (batch, length)."""
    a = MODELS[name]
    generator = torch.Generator().manual_seed(4)
    return torch.randint(a.vocabulary, (a.batch, a.length), generator=generator).to(device)
