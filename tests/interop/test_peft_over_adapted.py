"""PEFT's own adapters over the layers of this package."""

import peft
import pytest
import torch
from torch import nn

from boft_ops import adapt


def adapted():
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), ["0"], block_size=4).eval()
    nn.init.normal_(model[0].skew, std=0.2)
    return model, torch.randn(4, 16)


def lora(model, **options):
    config = peft.LoraConfig(r=2, target_modules=["0"], **options)
    return peft.get_peft_model(model, config).eval()


def test_lora_over_a_rotated_layer():
    """PEFT takes every attribute ``base_layer`` for a layer that it has wrapped."""
    model, x = adapted()
    before = model(x)
    tuned = lora(model, init_lora_weights=False)
    after = tuned(x)
    assert not torch.allclose(after, before)
    with tuned.disable_adapter():
        torch.testing.assert_close(tuned(x), before)
    tuned.train()(x).sum().backward()
    trained = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    assert all(grad.abs().sum() > 0 for grad in trained.values())
    with pytest.raises(RuntimeError, match=r"weight: expected no writing .* merge\(\) first"):
        tuned.merge_adapter()
    tuned.eval()
    torch.testing.assert_close(tuned(x), after)
    model[0].get_base_layer().merge()
    tuned.merge_adapter()
    torch.testing.assert_close(tuned(x), after)
