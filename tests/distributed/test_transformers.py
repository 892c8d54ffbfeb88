"""A model that transformers shards while it loads it, and that is adapted afterwards."""

import pytest
import torch
import torch.distributed as dist
from distributed_models import randomize

import boft_ops

VOCABULARY = 64


def make_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def losses(model, alone):
    """The losses of three steps, on this rank's part of each batch, or alone on all of it."""
    boft_ops.adapt(model, ["q_proj", "down_proj"], block_size=4)
    randomize(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, history = torch.optim.AdamW(trained, lr=1e-2), []
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(3):
        torch.manual_seed(10 + step)
        tokens = torch.randint(0, VOCABULARY, (2 * world, 8))
        tokens = tokens if alone else tokens[2 * rank : 2 * rank + 2]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if not alone:
            dist.all_reduce(loss)
            loss /= world
        history.append(loss)
    return torch.stack(history)


@pytest.fixture
def can_shard():
    """Skip with a transformers that cannot; ranks do not know how to skip."""
    distributed = pytest.importorskip("transformers.distributed")
    if not hasattr(distributed.DistributedConfig, "fsdp_size"):
        pytest.skip("a transformers that shards no models")


@pytest.mark.processes(2)
@pytest.mark.filterwarnings("ignore")
def test_distributed_config_then_adapt(can_shard, tmp_path):
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        make_llama().save_pretrained(tmp_path)
    dist.barrier()
    config = DistributedConfig(fsdp_size=2)
    sharded = type(make_llama()).from_pretrained(tmp_path, distributed_config=config)
    want, got = losses(make_llama(), alone=True), losses(sharded, alone=False)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
