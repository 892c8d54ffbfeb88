"""Adapters under policies that cast parameters to bfloat16."""

import pytest
import torch
from distributed_models import OPTIONS, TARGETS, mesh_of_all, pretrained, shard
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)

import boft_ops

OFFSET = 0.003  # in bfloat16 1.003 is 1


def adapted():
    model = boft_ops.adapt(pretrained(), TARGETS, **OPTIONS)
    for name, parameter in model.named_parameters():
        if name.endswith("skew"):
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
        if name.endswith("scale_offset"):
            nn.init.constant_(parameter, OFFSET)
    return model


def sharded(model):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return shard(model, mp_policy=policy)


def flat(model):
    policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    return FullyShardedDataParallel(model, mixed_precision=policy, **options)


@pytest.mark.processes(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [sharded, flat], ids=lambda wrap: wrap.__name__)
def test_a_policy_that_casts_parameters_leaves_three_digits_of_an_offset(wrap):
    """The model runs in bfloat16 as the merged weights of the float32 adapters do."""
    model = adapted()
    merged = boft_ops.merge(adapted().eval()).bfloat16()
    seen = []
    layer = model.blocks[0].up
    hook = lambda layer, _: seen.append((layer.scale_offset.dtype, layer.scale.detach()))  # noqa: E731
    layer.register_forward_pre_hook(hook)
    model, x = wrap(model), torch.randn(64, 3, 16)
    y = model(x)
    y.float().sum().backward()
    (dtype, scale), *_ = seen
    assert dtype == torch.bfloat16
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale - 1, torch.full((32,), OFFSET), rtol=0.0025, atol=0)
    exact = boft_ops.merge(adapted().eval()).double()(x.double())
    error = (y.double() - exact).norm()
    assert error <= 2 * (merged(x.bfloat16()).double() - exact).norm()


@pytest.mark.processes(2)
def test_adapters_over_a_base_in_bfloat16_stay_in_float32():
    """Without a policy the shards keep their dtypes: frozen and trained ones may differ."""
    model = pretrained().bfloat16()
    boft_ops.adapt(model, TARGETS, modules_to_save=["head"], **OPTIONS)
    seen = []
    layer = model.blocks[0].up
    layer.register_forward_pre_hook(
        lambda layer, _: seen.append((layer.skew.dtype, layer.scale_offset.dtype, layer.bias.dtype))
    )
    fully_shard(model.head, mesh=mesh_of_all())  # one dtype for what is trained in a group
    shard(model)
    model(torch.randn(2, 3, 16).bfloat16()).float().sum().backward()
    assert seen == [(torch.float32, torch.float32, torch.bfloat16)]
    assert layer.scale_offset.grad.to_local().abs().max() > 0
