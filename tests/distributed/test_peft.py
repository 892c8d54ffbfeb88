"""PEFT's adapters over a base that was sharded first: accelerated ones train as one process."""

import pytest
import torch
from distributed_models import TARGETS, pretrained, shard, train
from peft import BOFTConfig, OFTConfig, get_peft_model

from boft_ops.interop.peft import accelerate, patched

CONFIGS = {
    "boft": lambda: BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "oft": lambda: OFTConfig(
        r=0, oft_block_size=4, target_modules=TARGETS, use_cayley_neumann=False
    ),
}


def adapters(model, kind, way):
    """The model with adapters that do something, the same ones on every rank."""
    if way == "patched":
        with patched():
            model = get_peft_model(model, CONFIGS[kind]())
    else:
        model = accelerate(get_peft_model(model, CONFIGS[kind]()))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                numbers = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(numbers + ("boft_s" in name))
    return model.train()


@pytest.mark.processes(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("way", ["accelerate", "patched"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_training_equals_one_process(kind, way, leaves):
    want = train(adapters(pretrained(), kind, way), alone=True)
    got = train(adapters(shard(pretrained(), leaves=leaves), kind, way))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
