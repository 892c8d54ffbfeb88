"""Four ways to finetune one classifier. They differ in what is trained besides the head."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from minilm import LINEARS, Classifier
from peft import LoraConfig, get_peft_model
from torch import nn

import boft_ops

# Each function takes the classifier, its encoder frozen, and returns the model to train.


def frozen(model: Classifier) -> nn.Module:
    return model


def lora(model: Classifier) -> nn.Module:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, modules_to_save=["head"])
    return get_peft_model(model, config)


def oft(model: Classifier) -> nn.Module:
    # One factor: a block-diagonal rotation of the layer's input, each block mixing 8 features.
    return boft_ops.adapt(model, LINEARS, n_factors=1, block_size=8, modules_to_save=["head"])


def boft(model: Classifier) -> nn.Module:
    # Two factors, the second with the blocks interleaved: every feature meets 16 others.
    return boft_ops.adapt(model, LINEARS, n_factors=2, block_size=8, modules_to_save=["head"])


@dataclass(frozen=True)
class Method:
    title: str
    prepare: Callable[[Classifier], nn.Module]
    merge: Callable[[nn.Module], nn.Module] | None  # folds the adapter into plain linear layers
    rates: tuple[float, ...]  # what --search tries: as many for each method, a factor of 3 apart
    rate: float  # the best of them on the validation split


def merge_lora(model: nn.Module) -> nn.Module:
    return model.merge_and_unload()


HEAD_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
ADAPTER_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
METHODS = {
    "frozen": Method("frozen features", frozen, None, HEAD_RATES, 3e-2),
    "lora": Method("LoRA r=8", lora, merge_lora, ADAPTER_RATES, 3e-3),
    "oft": Method("OFT b=8", oft, boft_ops.merge, ADAPTER_RATES, 1e-2),
    "boft": Method("BOFT(2,8)", boft, boft_ops.merge, ADAPTER_RATES, 3e-3),
}


def build(name: str, top: nn.Module, seed: int) -> nn.Module:
    """A fresh model of one method: same pretrained layers and same head for all of them."""
    torch.manual_seed(seed)
    model = Classifier(top)
    model.encoder.requires_grad_(False)
    return METHODS[name].prepare(model)
