"""FSDP reads, replaces and writes back the parameters of a layer through its attributes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import boft_ops


@pytest.fixture
def one_process(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16))
    boft_ops.adapt(model, ["0", "2"], block_size=4)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.skew, std=0.2)
    return model


def version_1(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def version_2(model):
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", [version_1, version_2])
def test_fsdp_trains_and_leaves_the_frozen_weight(shard, one_process):
    model, x = adapted(), torch.randn(4, 32)
    sharded = shard(adapted())
    for m in (model, sharded):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = m(x).square().mean()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(sharded(x), model(x))
    if shard is version_1:
        with FullyShardedDataParallel.summon_full_params(sharded):
            assert torch.equal(sharded.module[0].frozen_weight, model[0].frozen_weight)
    else:
        assert torch.equal(sharded[0].frozen_weight.full_tensor(), model[0].frozen_weight)
