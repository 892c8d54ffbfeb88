"""Bytes that a Llama layer saves for backward, by token: the table of docs/distributed.md."""

import pytest
import torch
from torch import nn

import boft_ops
from boft_ops import BOFTLinear
from boft_ops._runtime import internals

ROWS = 97  # a prime, which tells what has a row for each token
SIZES = {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 1, "vocab_size": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 1}
LINEAR = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"


def built(dtype, scale):
    """One decoder layer of the shape of Llama-3.1-8B, a 64th as wide, and a batch for it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SIZES, **HEADS, attn_implementation="sdpa")
    torch.manual_seed(0)
    model = transformers.LlamaModel(config).to(dtype).requires_grad_(False)
    if scale is not None:
        boft_ops.adapt(model, list(LINEAR), block_size=8, n_factors=2, scale=scale)
        for layer in model.modules():
            if isinstance(layer, BOFTLinear):
                nn.init.normal_(layer.skew, std=0.1)
    embedded = torch.randn(1, ROWS, SIZES["hidden_size"], dtype=dtype, requires_grad=True)
    return model.train(), embedded


def saved_numbers(model, embedded, keeps_output, monkeypatch):
    """Numbers by token in the storages that the forward pass keeps, parameters left out."""
    storages = {}

    def keep(tensor):
        if tensor.numel() and tensor.numel() % ROWS == 0:
            storages[tensor.untyped_storage().data_ptr()] = tensor  # held: no address comes again
        return tensor

    # the native call looks for hooks, and saves what they are to see
    see_none = (lambda _: None) if keeps_output else (lambda _: object())
    monkeypatch.setattr(internals, "saved_tensor_hooks", see_none)
    hooks = []
    for layer in model.modules():
        if keeps_output and isinstance(layer, BOFTLinear) and layer.scale_offset is not None:

            def hook(layer, args, y):
                keep(y.detach())

            hooks.append(layer.register_forward_hook(hook))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs_embeds=embedded, use_cache=False)
    for hook in hooks:
        hook.remove()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = [t.untyped_storage().nbytes() // t.itemsize for a, t in storages.items() if a not in own]
    return sum(kept) / ROWS


def test_a_trained_scale_keeps_outputs_that_the_consumer_keeps_too(monkeypatch):
    """v, gate and up are kept by what follows; q, k, o and down are what the scale keeps alone."""
    d, n_kv, h = SIZES["hidden_size"], 16, SIZES["intermediate_size"]
    model, embedded = built(torch.float32, scale=False)
    unscaled = saved_numbers(model, embedded, False, monkeypatch)
    model, embedded = built(torch.float32, scale=True)
    z_saved = saved_numbers(model, embedded, False, monkeypatch)
    y_kept = saved_numbers(model, embedded, True, monkeypatch)
    assert z_saved - unscaled == pytest.approx(3 * d + 2 * n_kv + 2 * h, rel=0.02)
    assert y_kept - unscaled == pytest.approx(3 * d + n_kv, rel=0.02)


def test_half_precision_on_a_cpu_saves_the_outputs_before_the_scale(monkeypatch):
    model, embedded = built(torch.bfloat16, scale=False)
    unscaled = saved_numbers(model, embedded, True, monkeypatch)
    model, embedded = built(torch.bfloat16, scale=True)
    got = saved_numbers(model, embedded, False, monkeypatch) - unscaled
    d, n_kv, h = SIZES["hidden_size"], 16, SIZES["intermediate_size"]
    assert got == pytest.approx(3 * d + 2 * n_kv + 2 * h, rel=0.02)
