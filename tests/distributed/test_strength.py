"""Strengths of sharded and replicated adapters: outputs are those of one process."""

import pytest
import torch
import torch.distributed as dist
from distributed_models import adapt, pretrained, shard
from parallel_models import LAYERS, adapted, base, close, data, fill, mesh, parallel, whole
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import boft_ops


def positive(model):
    """Scales that have powers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale_offset"):
                parameter.add_(1).abs_().sub_(0.5)
    return model.eval()


@pytest.mark.processes(2)
@pytest.mark.parametrize("options", [{}, {"side": "out"}, {"scale": False}], ids=str)
def test_tensor_parallel(options):
    x, _ = data()
    reference, model = positive(adapted(**options)), positive(parallel(**options))
    assert model.up.at_strength() == (model.up.skew, model.up.scale_offset)  # the very tensors
    for t in (0, 0.5, -1.5, 1):
        want = boft_ops.set_strength(reference, t)(x)
        close(boft_ops.set_strength(model, t)(x), want)
        close(model.down.merged_weight(), reference.down.merged_weight())


@pytest.mark.processes(2)
def test_adapters_over_cut_bases():
    """Parallelized first, so that the adapters are cut; and one whose outputs are gathered."""
    x, _ = data()
    reference = positive(fill(boft_ops.adapt(base(), LAYERS, block_size=4)))
    styles = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(base(), mesh(), styles)
    positive(fill(boft_ops.adapt(model, LAYERS, block_size=4)))
    assert model.down.adapters["default"].is_cut
    boft_ops.set_strength(reference, 0.5)
    close(boft_ops.set_strength(model, 0.5)(x), reference(x))
    index = torch.zeros(x.shape[:-1], dtype=torch.int64)
    close(model.gate.prepare()(x, index), reference.gate(x).chunk(2, -1)[dist.get_rank()])
    model.gate.adapters["default"].set_strength(1)  # the prepared matrices are no longer these
    reference.gate.set_strength(1)
    close(model.gate(x, index), reference.gate(x).chunk(2, -1)[dist.get_rank()])


@pytest.mark.processes(2)
@pytest.mark.parametrize("order", ["adapt, shard", "shard, adapt", "set, shard"])
def test_fully_shard(order, tmp_path):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(dist.get_rank()))
    reference = positive(adapt(pretrained()))
    if order == "shard, adapt":
        model = positive(adapt(shard(pretrained())))
    else:
        model = positive(adapt(pretrained()))
        if order == "set, shard":
            boft_ops.set_strength(model, 0.5)
        model = shard(model)
    if order != "set, shard":
        boft_ops.set_strength(model, 0.5)
    boft_ops.set_strength(reference, 0.5)
    with torch.no_grad():
        close(model(x), reference(x))
        path = tmp_path / "a.safetensors"
        other = positive(adapt(pretrained()))
        for name, parameter in other.named_parameters():
            if name.endswith("skew"):
                parameter.mul_(-2)
        boft_ops.save_adapter(other, path)
        boft_ops.set_strength(other, 0.5)
        boft_ops.load_adapter(model, path)  # written into shards, gathered again
        close(model(x), other(x))
        close(boft_ops.set_strength(model, 0)(x), boft_ops.set_strength(other, 0)(x))


@pytest.mark.processes(2)
def test_all_ranks_refuse_a_scale_without_powers():
    """A negative number on the second rank alone."""
    model = positive(parallel())
    with torch.no_grad():
        if dist.get_rank() == 1:
            model.up.scale_offset.to_local()[0] = -2
    with pytest.raises(ValueError, match="expected 0 or 1 over a scale that is not positive"):
        boft_ops.set_strength(model, 0.5)
    assert model.gate.strength == 1
    assert (whole(model.up.scale) < 0).sum() == 1


@pytest.mark.processes(2)
def test_vectors_that_are_cut_have_no_powers():
    from torch.distributed.tensor import Shard, distribute_tensor

    layer = boft_ops.BOFTLinear(16, 16, block_size=4)
    layer.skew = nn.Parameter(distribute_tensor(layer.skew.detach(), mesh(), [Shard(2)]))
    with pytest.raises(ValueError, match="expected whole vectors on each rank"):
        layer.eval().set_strength(0.5).at_strength()
