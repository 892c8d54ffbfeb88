"""Tensor parallelism on two ranks: outputs, gradients, dropout and merging are those of one."""

import copy

import pytest
import torch
import torch.distributed as dist
from parallel_models import (
    LAYERS,
    D,
    H,
    adapted,
    assert_alike,
    base,
    close,
    data,
    fill,
    mesh,
    parallel,
    plan,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import boft_ops
from boft_ops.distributed import ColwiseBOFT, RowwiseBOFT


@pytest.mark.processes(2)
@pytest.mark.parametrize(
    "options",
    [{}, {"n_factors": 1, "scale": False}, {"n_factors": 3}, {"side": "out"}, {"kaleidoscope": 1}],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_one_process(options):
    model = parallel(**options)
    cut, other = ("gate", "down") if options.get("side") == "out" else ("down", "gate")
    assert getattr(model, cut).skew.placements == (Shard(1),)
    assert getattr(model, other).skew.placements == (Replicate(),)
    assert assert_alike(model, adapted(**options))
    assert getattr(model, other).skew.grad.placements == (Partial(),)
    assert getattr(model, cut).skew.grad.placements == (Shard(1),)


@pytest.mark.processes(2)
@pytest.mark.parametrize("gathers", ["a module", "the layer"])
def test_sequence_parallel(gathers):
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
    reference = fill(nn.Sequential(nn.LayerNorm(D), boft_ops.adapt(mlp, ["0", "2"])))
    reference[0].requires_grad_(False)
    layout = {"0": SequenceParallel(use_local_output=True)}
    layout["1.2"] = RowwiseBOFT(output_layouts=Shard(1))
    if gathers == "the layer":
        layout["1.0"] = ColwiseBOFT(input_layouts=Shard(1))
    else:
        gather = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
        layout |= {"1": PrepareModuleInput(**gather), "1.0": ColwiseBOFT()}
    model = parallelize_module(copy.deepcopy(reference), mesh(), layout)
    model[0].requires_grad_(False)  # torch's style makes them trainable
    rank = dist.get_rank()
    assert len(assert_alike(model, reference, slice(3 * rank, 3 * rank + 3))) == 4


@pytest.mark.processes(2)
def test_layouts_as_torchs_styles_have_them():
    """Whole outputs, DTensors in and out, outputs that the ranks do not divide, plain layers."""
    torch.manual_seed(0)
    layer = fill(boft_ops.BOFTLinear(D, 7, block_size=4))
    x, _ = data()
    want = layer(x)
    style = ColwiseBOFT(output_layouts=Replicate())
    close(parallelize_module(copy.deepcopy(layer), mesh(), style)(x), want)
    style = ColwiseBOFT(use_local_output=False)
    got = parallelize_module(copy.deepcopy(layer), mesh(), style)(x)
    assert (got.shape, got.placements) == (want.shape, (Shard(2),))
    close(got, want)
    style = RowwiseBOFT(input_layouts=Replicate(), use_local_output=False)
    got = parallelize_module(copy.deepcopy(layer), mesh(), style)(x)
    assert got.placements == (Replicate(),)
    close(got, want)
    plain = parallelize_module(base(), mesh(), plan())
    assert plain.down.weight.placements == (Shard(1),)
    close(plain(x), base()(x))


@pytest.mark.processes(2)
def test_one_drop_mask_for_all_ranks():
    """Ranks with other seeds drop the same blocks: those that the first rank draws."""
    options = {"p_component": 1.0, "p_block": 0.5}
    model, reference = parallel(**options).train(), adapted(**options).train()
    x, _ = data()
    torch.manual_seed(7)
    want = [reference(x) for _ in range(2)]
    torch.manual_seed(7 + 5 * dist.get_rank())
    got = [model(x) for _ in range(2)]
    close(got[0], want[0])
    close(got[1], want[1])
    assert (want[0] - want[1]).abs().max() > 0.01
    torch.manual_seed(7 + 5 * dist.get_rank())
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    torch.manual_seed(7)
    reference(x).sum().backward()
    for name in LAYERS:
        close(getattr(model, name).skew.grad, getattr(reference, name).skew.grad)


@pytest.mark.processes(2)
@pytest.mark.parametrize("options", [{}, {"side": "out"}], ids=str)
def test_merging_is_local(options):
    """merge() of layers and of the model, undone, and in the state dict of a plain model."""
    model, reference = parallel(**options).eval(), adapted(**options).eval()
    x, _ = data()
    want, former = reference(x), model.down.frozen_weight.full_tensor()
    for keep in (True, False):
        for name in LAYERS:
            getattr(model, name).merge(keep=keep)
        close(model(x), want)
        close(model.down.frozen_weight, reference.down.merged_weight())
        for name in LAYERS:
            getattr(model, name).unmerge()
        close(model.down.frozen_weight, former)
        close(model(x), want)
    boft_ops.merge(model)
    assert type(model.down) is nn.Linear
    close(model(x), want)
    merged = boft_ops.merge(reference).state_dict()
    assert merged.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        close(tensor, merged[name])


@pytest.mark.processes(2)
def test_several_adapters_are_cut_with_their_base():
    """Served rows, and the active list, over a base that torch's styles have cut before."""
    reference, model = (
        base(),
        parallelize_module(base(), mesh(), plan(ColwiseParallel, RowwiseParallel)),
    )
    for one in (reference, model):
        for name in LAYERS:
            layer = boft_ops.MultiAdapterLinear(getattr(one, name))
            layer.add_adapter("default", block_size=4)
            layer.add_adapter("other", block_size=4, n_factors=1, active=False)
            setattr(one, name, layer)
        fill(one)
    assert model.down.adapters["default"].skew.placements == (Shard(1),)
    assert model.gate.adapters["default"].scale_offset.placements == (Shard(0),)
    x, grad = data()
    got, want = model(x), reference(x)
    close(got, want)
    got.backward(grad)
    want.backward(grad)
    for name in LAYERS:
        for part in ("skew", "scale_offset"):
            one, other = (
                getattr(getattr(m, name).adapters["default"], part) for m in (model, reference)
            )
            close(one.grad, other.grad)
    index = torch.tensor([1, -1, 0])[:, None]
    for one in (model, reference):
        for layer in one.eval().children():
            layer.request_index = index
    close(model(x), reference(x))
    for layer in model.children():
        layer.prepare()
    close(model(x), reference(x))


@pytest.mark.processes(2)
def test_adapt_after_the_styles_of_torch():
    model = parallelize_module(base(), mesh(), plan(ColwiseParallel, RowwiseParallel))
    boft_ops.adapt(model, LAYERS, block_size=4, p_component=1.0, p_block=0.5)
    fill(model)
    reference = adapted(p_component=1.0, p_block=0.5)
    assert_alike(model.eval(), reference.eval())
    torch.manual_seed(5 + dist.get_rank())
    x, _ = data()
    got = model.train()(x)
    torch.manual_seed(5)
    close(got, reference.train()(x))


@pytest.mark.processes(2)
def test_what_cannot_be_cut_is_refused():
    layer = boft_ops.BOFTLinear(24, 8, block_size=4, n_factors=2)
    with pytest.raises(ValueError, match=r"on each of 2 ranks, which have 12 of 24.*Nearest valid"):
        parallelize_module(layer, mesh(), RowwiseBOFT())
    assert not isinstance(layer.frozen_weight, DTensor)
    odd = boft_ops.BOFTLinear(9, 8, block_size=3, n_factors=1)
    with pytest.raises(ValueError, match="expected features that 2 ranks divide, got 9"):
        parallelize_module(odd, mesh(), RowwiseBOFT())
    with pytest.raises(ValueError, match="expected an unmerged layer"):
        parallelize_module(adapted().gate.merge(), mesh(), ColwiseBOFT())
    with pytest.raises(TypeError, match="expected a linear layer, got BOFTConv2d"):
        parallelize_module(boft_ops.BOFTConv2d(16, 8, 1), mesh(), ColwiseBOFT())
    known_to_torch = parallelize_module(adapted().gate, mesh(), ColwiseParallel())
    with pytest.raises(ValueError, match="use ColwiseBOFT and RowwiseBOFT"):
        known_to_torch(torch.randn(2, D))
    square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match="device_mesh: expected one dimension"):
        ColwiseBOFT()._apply(adapted().gate, square)
    rows = parallelize_module(nn.Linear(D, 8), mesh(), RowwiseParallel(output_layouts=Shard(0)))
    served = boft_ops.MultiAdapterLinear(rows)
    served.add_adapter("a")
    with pytest.raises(ValueError, match="as sequence parallelism makes it: adapt the model first"):
        served(torch.randn(4, D // 2))
    with pytest.raises(ValueError, match="x: expected a last dimension of 16"):
        served(torch.randn(4, D))


@pytest.mark.processes(2)
def test_compiled_layers():
    model = parallel()
    model.compile(backend="aot_eager", fullgraph=True)
    assert_alike(model, adapted())
