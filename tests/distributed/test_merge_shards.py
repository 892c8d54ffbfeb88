"""Merging into shards of FSDP, alone and beside tensor parallelism, and what is refused."""

import pytest
import torch
import torch.distributed as dist
from parallel_models import LAYERS, adapted, close, data, fill, plan
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

import boft_ops


def sharded(model, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return fully_shard(model, mesh=mesh, reshard_after_forward=True, **options)


def merge_layers(model, **options):
    for name in LAYERS:
        getattr(model, name).merge(**options)


@pytest.mark.processes(2)
@pytest.mark.parametrize("options", [{}, {"side": "out"}, {"kaleidoscope": 1}], ids=str)
def test_layers_merge_on_the_shards_of_fsdp(options):
    """The sharded parameter itself is written to, which FSDP gathers from in the next forward."""
    gathered = []
    real = DTensor.full_tensor

    def noted(tensor, **kwargs):
        gathered.append(tuple(tensor.shape))
        return real(tensor, **kwargs)

    model, reference = sharded(adapted(**options)).eval(), adapted(**options).eval()
    x, _ = data()
    want = reference(x)
    close(model(x), want)
    former = model.down.frozen_weight.full_tensor()
    for keep in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DTensor, "full_tensor", noted)
            merge_layers(model, keep=keep)
        assert not {(64, 32), (32, 64)} & set(gathered)  # no weight, as all groups are whole
        assert isinstance(model.down.frozen_weight, DTensor)
        for _ in range(2):  # sharded again in between
            close(model(x), want)
        for name in LAYERS:
            getattr(model, name).unmerge()
        close(model.down.frozen_weight, former)
        close(model(x), want)


@pytest.mark.processes(2)
def test_the_state_of_a_merged_model_is_that_of_a_plain_one():
    model = boft_ops.merge(sharded(adapted()))
    assert type(model.down) is nn.Linear
    want = boft_ops.merge(adapted()).state_dict()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        assert state.keys() == want.keys()
        for name, tensor in want.items():
            close(state[name], tensor)


@pytest.mark.processes(2)
def test_groups_that_cross_shards_and_shards_that_are_empty():
    """A rotation of 6 outputs in groups of 6, on shards of 3; one output on two ranks."""
    for layer, outputs in (
        (boft_ops.BOFTLinear(8, 6, block_size=6, n_factors=1, side="out"), 6),
        (boft_ops.BOFTLinear(8, 1, block_size=4), 1),
        (boft_ops.BOFTConv2d(4, 6, 2, block_size=4), 6),
    ):
        torch.manual_seed(0)
        layer.reset_parameters()
        fill(layer)
        want = layer.merged_weight()
        sharded(layer)
        got = layer.merged_weight()
        assert (got.placements, len(got)) == ((Shard(0),), outputs)
        close(got, want)
    cut = sharded(adapted().down, shard_placement_fn=lambda p: Shard(min(1, p.dim() - 1)))
    assert cut.frozen_weight.placements == (Shard(1),)
    close(cut.merged_weight(), adapted().down.merged_weight())


@pytest.mark.processes(2)
def test_merging_a_gathered_weight_is_refused():
    """FSDP would put the shard of the former weight back, and the adapter would be gone."""
    model, (x, _) = sharded(adapted()).eval(), data()
    want = model(x)
    model.unshard()
    with pytest.raises(ValueError, match="got one that FSDP has gathered and will replace"):
        model.down.merge()
    model.reshard()
    assert not model.down.merged
    model.down.merge()
    model.unshard()
    with pytest.raises(ValueError, match="got one that FSDP has gathered and will replace"):
        model.down.unmerge()
    model.reshard()
    close(model(x), want)
    wrapped = FullyShardedDataParallel(
        adapted(), use_orig_params=True, device_id=torch.device("cpu")
    )
    with (
        FullyShardedDataParallel.summon_full_params(wrapped),
        pytest.raises(ValueError, match=r"merge\(\) outside of unshard\(\) and summon_full_params"),
    ):
        wrapped.module.down.merge()


@pytest.mark.exhaustive
@pytest.mark.processes(4)
@pytest.mark.parametrize("options", [{}, {"side": "out"}], ids=str)
def test_fsdp_beside_tensor_parallelism(options):
    """Three steps of training, then merging, on 2 x 2 ranks, against one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    part = mesh["dp"].get_local_rank()
    runs = []
    for is_parallel in (False, True):
        model = adapted(**options)
        if is_parallel:
            model = parallelize_module(model, mesh["tp"], plan())
            for name in LAYERS:
                fully_shard(getattr(model, name), mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
            fill(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(2, 4, 6, 32, generator=generator)
            if is_parallel:
                x, y = (t[2 * part : 2 * part + 2] for t in (x, y))
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            value = loss.detach().clone()
            if is_parallel:
                dist.all_reduce(value)
                value /= 4
            losses.append(value)
        runs.append((model.eval(), torch.stack(losses)))
    (reference, want), (model, got) = runs
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    x, _ = data()
    out = reference(x)
    torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-4)
    model.reshard()
    merge_layers(model)
    torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-4)
