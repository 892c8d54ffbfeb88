"""Adapters on models that transformers has cut by its own tensor-parallel plan."""

import pytest
import torch
import torch.distributed as dist
import transformers
from parallel_models import close, fill
from torch.distributed.tensor import Replicate, Shard

import boft_ops

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.processes(2)
@pytest.mark.parametrize("scale", [True, False])
def test_a_plan_of_transformers(scale, tmp_path):
    distributed = pytest.importorskip("transformers.distributed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    if dist.get_rank() == 0:
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    dist.barrier()
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    plan = distributed.DistributedConfig(tp_size=2, tp_plan="auto")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, distributed_config=plan)
    for one in (reference, model):
        fill(boft_ops.adapt(one, LAYERS, block_size=4, scale=scale))
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.adapters["default"].skew.placements == (Replicate(),)
    assert attention.o_proj.adapters["default"].skew.placements == (Shard(1),)
    ids = torch.arange(12).reshape(2, 6)
    got, want = (one(input_ids=ids, labels=ids) for one in (model, reference))
    close(got.logits, want.logits)
    got.loss.backward()
    want.loss.backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.requires_grad}
    found = {n.replace(".adapters.default", ""): p for n, p in model.named_parameters()}
    assert len(expected) == len(LAYERS) * (1 + scale)
    for name, grad in expected.items():
        close(found[name].grad, grad)
    with torch.no_grad():
        close(model(input_ids=ids).logits, want.logits)
