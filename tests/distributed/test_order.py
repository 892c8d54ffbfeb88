"""Adapting a model that is distributed already is right, or is refused."""

import pytest
import torch
from distributed_models import OPTIONS, TARGETS, adapt, mesh_of_all, pretrained, shard, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import boft_ops


def flat(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


@pytest.mark.processes(2)
@pytest.mark.filterwarnings("ignore")
def test_wrappers_that_average_by_themselves_are_refused():
    wrapped = {
        "DistributedDataParallel": DistributedDataParallel(pretrained()),
        "FullyShardedDataParallel": flat(pretrained(), use_orig_params=True),
    }
    for name, model in wrapped.items():
        before = [type(module) for module in model.modules()]
        with pytest.raises(
            ValueError, match=rf"expected adapt\(\) before {name}, got 'blocks.0.up'"
        ):
            boft_ops.adapt(model, TARGETS, **OPTIONS)
        assert before == [type(module) for module in model.modules()]
    for use_orig_params in (True, False):
        model = flat(pretrained(), use_orig_params=use_orig_params).module
        with pytest.raises(ValueError, match=r"'blocks\.0\.up' with a weight that it manages"):
            boft_ops.adapt(model, TARGETS, **OPTIONS)


@pytest.mark.processes(2)
def test_the_inside_of_a_wrapper_is_refused_as_long_as_the_wrapper_lives():
    wrapper = DistributedDataParallel(pretrained())
    wrapper.itself = [wrapper]  # a cycle, which only the garbage collector ends
    model = wrapper.module
    for inside, targets in ((model, TARGETS), (model.blocks, ["0.up"])):
        with pytest.raises(ValueError, match=r"expected adapt\(\) before DistributedDataParallel"):
            boft_ops.adapt(inside, targets, **OPTIONS)
    boft_ops.adapt(pretrained(), TARGETS, **OPTIONS)  # another model
    del wrapper, inside
    boft_ops.adapt(model, TARGETS, **OPTIONS)


@pytest.mark.processes(2)
def test_a_file_is_refused_likewise(tmp_path):
    path = tmp_path / "a.safetensors"
    boft_ops.save_adapter(adapt(pretrained()), path)
    with pytest.raises(ValueError, match=r"expected adapt\(\) before DistributedDataParallel"):
        boft_ops.load_adapter(DistributedDataParallel(pretrained()), path)


@pytest.mark.processes(2)
def test_sharded_bases_that_nobody_averages_for_are_refused():
    model = pretrained()
    sharded = shard(model, ignored_params=set(model.parameters()))
    with pytest.raises(ValueError, match=r"blocks\.0\.up: .* got one that it ignores"):
        adapt(sharded)
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"0: expected adapt\(\) before the layer is"):
        boft_ops.adapt(shard_one(model), ["0"], block_size=4)
    model = shard(pretrained())
    with pytest.raises(ValueError, match="side: expected 'in' over a base that is only called"):
        adapt(model, side="out")


def shard_one(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh_of_all())


@pytest.mark.processes(4)
def test_tensor_parallel_shards_are_refused():
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = pretrained()
    parallelize_module(
        model, grid["tensor"], {f"blocks.{i}.up": ColwiseParallel() for i in range(3)}
    )
    model = shard(model, grid["data"])
    with pytest.raises(
        ValueError, match=r"blocks\.0\.up: expected a weight that fully_shard alone"
    ):
        boft_ops.adapt(model, ["up"], **OPTIONS)


@pytest.mark.processes(4)
@pytest.mark.parametrize("order", ["adapt, shard", "shard, adapt"])
def test_hybrid_shards_train_as_one_process(order):
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    want = train(adapt(pretrained()), alone=True)
    if order == "adapt, shard":
        model = shard(adapt(pretrained()), grid)
    else:
        model = adapt(shard(pretrained(), grid))
    torch.testing.assert_close(train(model), want, rtol=1e-5, atol=1e-5)


@pytest.mark.processes(2)
def test_adapters_of_a_sharded_base_stay_in_float32():
    """A policy casts what fully_shard manages, which such adapters are not."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = adapt(shard(pretrained(), mp_policy=policy))
    seen = []
    layer = model.blocks[0].up
    layer.register_forward_pre_hook(
        lambda _, args: seen.append(
            (args[0].dtype, layer.base.weight.dtype, layer.adapters.default.skew.dtype)
        )
    )
    model(torch.randn(2, 3, 16)).sum().backward()
    assert seen == [(torch.bfloat16, torch.bfloat16, torch.float32)]
    assert layer.adapters.default.scale_offset.grad.to_local().abs().max() > 0


@pytest.mark.processes(2)
@pytest.mark.parametrize("before", ["forward", "backward"])
def test_a_sharded_model_that_has_run_can_be_adapted(before):
    model = shard(pretrained(), reshard_after_forward=False)
    loss = model(torch.randn(2, 3, 16)).sum()
    if before == "backward":
        loss.backward()
        model.zero_grad()
    want = train(adapt(pretrained()), alone=True)
    torch.testing.assert_close(train(adapt(model)), want, rtol=1e-5, atol=1e-5)
