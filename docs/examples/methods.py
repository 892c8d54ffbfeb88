"""Four ways to finetune one classifier. They differ in the parameters trained besides the head."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from minilm import LINEARS, Classifier
from peft import LoraConfig, get_peft_model
from torch import nn

import boft_ops

# Each function takes the classifier with a frozen encoder, and returns the model to train.


def frozen(model: Classifier) -> nn.Module:
    """Train only the head."""
    return model


def lora(model: Classifier) -> nn.Module:
    """Add PEFT's low-rank updates of rank 8."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, modules_to_save=["head"])
    return get_peft_model(model, config)


def oft(model: Classifier) -> nn.Module:
    """Add block-diagonal rotations of the inputs; each block mixes 8 features."""
    return boft_ops.adapt(model, LINEARS, n_factors=1, block_size=8, modules_to_save=["head"])


def boft(model: Classifier) -> nn.Module:
    """Add rotations of two factors; the blocks of the second are interleaved to mix 16 features."""
    return boft_ops.adapt(model, LINEARS, n_factors=2, block_size=8, modules_to_save=["head"])


@dataclass(frozen=True)
class Method:
    """One way to finetune.

    Attributes:
        title: name in tables and pictures.
        prepare: a function that adds the adapter.
        merge: a function that folds the adapter into plain linear layers, or None.
        rates: learning rates of --search, as many for each method and a factor of 3 apart.
        rate: the rate for boft_ops.param_groups.
    """

    title: str
    prepare: Callable[[Classifier], nn.Module]
    merge: Callable[[nn.Module], nn.Module] | None
    rates: tuple[float, ...]
    rate: float


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold LoRA's updates into plain linear layers."""
    return model.merge_and_unload()


HEAD_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
ADAPTER_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
METHODS = {
    "frozen": Method("frozen features", frozen, None, HEAD_RATES, 3e-2),
    "lora": Method("LoRA r=8", lora, merge_lora, ADAPTER_RATES, 3e-3),
    "oft": Method("OFT b=8", oft, boft_ops.merge, ADAPTER_RATES, 3e-3),
    "boft": Method("BOFT(2,8)", boft, boft_ops.merge, ADAPTER_RATES, 3e-3),
}


def build(name: str, top: nn.Module, seed: int, n_classes: int = 2) -> nn.Module:
    """Build a model of one method, with the same pretrained layers and head for all methods."""
    torch.manual_seed(seed)
    model = Classifier(top, n_classes)
    model.encoder.requires_grad_(False)
    return METHODS[name].prepare(model)
