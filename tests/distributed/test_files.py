"""Adapter files of wrapped and sharded models are those of a single process."""

import pytest
import torch
import torch.distributed as dist
from distributed_models import adapt, pretrained, randomize, shard
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DataParallel, DistributedDataParallel

import boft_ops


def flat(model):
    units = ModuleWrapPolicy({type(model.blocks[0]), nn.Linear})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(
        model, auto_wrap_policy=units, use_orig_params=True, device_id=cpu
    )


def checkpointed(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    return model


def compiled(model):
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return torch.compile(DistributedDataParallel(checkpointed(model)), backend="eager")


def hybrid(model):
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return shard(model, grid)


WRAPPERS = {
    "DistributedDataParallel": DistributedDataParallel,
    "DataParallel": DataParallel,
    "FullyShardedDataParallel": flat,
    "fully_shard": shard,
    "checkpoint_wrapper": checkpointed,
    "checkpoint_wrapper, fully_shard": lambda model: shard(checkpointed(model)),
    "torch.compile of everything": compiled,
}
# Two of the others at once, and a compilation.
SLOW_WRAPPERS = ("checkpoint_wrapper, fully_shard", "torch.compile of everything")


def file_and_outputs(wrap, folder, order="adapt, wrap"):
    """Save through the wrapper, load into others, and compare with a single process."""
    path, alone = folder / "wrapped.safetensors", folder / f"alone{dist.get_rank()}.safetensors"
    single = adapt(pretrained())
    with torch.no_grad():
        single.head.bias.add_(1)
    boft_ops.save_adapter(single, alone)
    model = pretrained()
    if order == "adapt, wrap":
        model = adapt(model)
    else:
        model = adapt(wrap(model))
    with torch.no_grad():
        model.head.bias.add_(1)
    if order == "adapt, wrap":
        model = wrap(model)
    boft_ops.save_adapter(model, path)
    dist.barrier()
    assert path.read_bytes() == alone.read_bytes()
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(3))
    loaded = boft_ops.load_adapter(pretrained(), path)
    torch.testing.assert_close(loaded(x), single(x), rtol=0, atol=0)
    if order == "adapt, wrap":
        other = adapt(pretrained())
        with torch.no_grad():
            for parameter in other.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        other = wrap(other)
    else:
        other = wrap(pretrained())
    assert boft_ops.load_adapter(other, path) is other
    torch.testing.assert_close(other(x), single(x), rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive_if(condition=lambda wrapper: wrapper in SLOW_WRAPPERS)
@pytest.mark.processes(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_writes_the_file_of_a_single_process(wrapper, tmp_path):
    file_and_outputs(WRAPPERS[wrapper], tmp_path)


@pytest.mark.processes(2)
def test_a_model_that_was_sharded_first_writes_the_same_file(tmp_path):
    file_and_outputs(shard, tmp_path, order="wrap, adapt")


@pytest.mark.processes(4)
def test_hybrid_shards_write_the_same_file(tmp_path):
    file_and_outputs(hybrid, tmp_path)


@pytest.mark.processes(2)
def test_every_rank_hears_that_the_file_could_not_be_written(tmp_path):
    model = shard(adapt(pretrained()))
    folder = tmp_path / "folder"
    path = folder / "a.safetensors"
    if dist.get_rank() == 0:
        (tmp_path / "folder").touch()  # no folder at all
        error, match = OSError, "folder"
    else:
        error, match = RuntimeError, "the rank that writes the file could not"
    dist.barrier()
    with pytest.raises(error, match=match):
        boft_ops.save_adapter(model, path)
    folder.unlink(missing_ok=True)


@pytest.mark.processes(2)
def test_a_file_that_does_not_fit_leaves_shards_unchanged(tmp_path):
    path = tmp_path / f"{dist.get_rank()}.safetensors"
    boft_ops.save_adapter(randomize(boft_ops.adapt(pretrained(), ["up"], block_size=2)), path)
    model = shard(adapt(pretrained()))
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="expected the model's BOFT layers"):
        boft_ops.load_adapter(model, path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), before[name])
