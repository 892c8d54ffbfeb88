"""Checkpoints of sharded models: torch's, accelerate's, and of other numbers of ranks."""

import types

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_models import OPTIONS, TARGETS, Model, adapt, pretrained, shard, train, trained
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import boft_ops

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
PARTIAL = StateDictOptions(strict=False)
ORDERS = {
    "adapt, shard": lambda model: shard(adapt(model)),
    "shard, adapt": lambda model: adapt(shard(model)),
}


@pytest.mark.processes(2)
@pytest.mark.parametrize("order", ORDERS)
def test_whole_state_is_gathered_and_broadcast(order):
    model = ORDERS[order](pretrained())
    state = get_model_state_dict(model, options=WHOLE)
    is_first = dist.get_rank() == 0
    assert not is_first or state.keys() == dict(model.named_parameters()).keys()
    other = ORDERS[order](pretrained())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, dict(state) if is_first else {}, options=options)
    back = get_model_state_dict(other, options=WHOLE)
    for name in state:
        assert torch.equal(back[name], state[name]), name


@pytest.mark.processes(2)
def test_whole_pretrained_state_is_set():
    """Such a state knows no adapters, and leaves them as they are."""
    model = shard(adapt(pretrained()))
    skew = model.blocks[0].up.skew.full_tensor()
    state = {name: tensor + 1 for name, tensor in pretrained().state_dict().items()}
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, dict(state), options=options)
    assert torch.equal(model.blocks[0].up.skew.full_tensor(), skew)
    weight = model.blocks[0].up.frozen_weight.full_tensor()
    assert torch.equal(weight, state["blocks.0.up.weight"])


@pytest.mark.processes(2)
@pytest.mark.parametrize("source", ["state", "checkpoint"])
@pytest.mark.parametrize("order", ["adapt, shard", "shard, adapt"])
def test_a_model_of_the_meta_device_is_the_pretrained_one(order, source, tmp_path):
    """Memory that to_empty hands out is poisoned here, and nothing loads the adapters."""
    with torch.device("meta"):
        model = Model()
    options = {"modules_to_save": ["head"], **OPTIONS}
    if order == "adapt, shard":
        model = shard(boft_ops.adapt(model, TARGETS, **options))
    else:
        model = boft_ops.adapt(shard(model), TARGETS, **options)
    torch.use_deterministic_algorithms(True)  # to_empty then gives NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        model.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(p.full_tensor().isnan().all() for p in model.head.parameters())
    state = {}  # names of parameters, which lie below the layers of models that were sharded first
    whole = pretrained().state_dict()
    for name, parameter in get_model_state_dict(model).items():
        if (plain := name.replace(".base.", ".")) in whole:
            state[name] = parameter if source == "checkpoint" else whole[plain]
    if source == "checkpoint":
        saved = {name: whole[name.replace(".base.", ".")] for name in state}
        dcp.save({"model": saved}, checkpoint_id=tmp_path)
        dcp.load({"model": state}, checkpoint_id=tmp_path)
    full = StateDictOptions(strict=False, full_state_dict=source == "state")
    set_model_state_dict(model, state, options=full)
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(model(x), pretrained()(x))


def checkpoint(model, optimizer):
    only = StateDictOptions(ignore_frozen_params=True)
    return {
        "model": get_model_state_dict(model, options=only),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def optimizer_of(model):
    return torch.optim.AdamW(trained(model), lr=1e-2)


def write(folder, order):
    model = ORDERS[order](pretrained())
    optimizer = optimizer_of(model)
    train(model, steps=2, optimizer=optimizer)
    dcp.save(checkpoint(model, optimizer), checkpoint_id=folder)
    return get_model_state_dict(model, options=WHOLE)


def read(folder, order):
    model = ORDERS[order](pretrained())
    optimizer = optimizer_of(model)
    state = checkpoint(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"], options=PARTIAL)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, steps=1, start=2, optimizer=optimizer)  # a step is possible
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"], options=PARTIAL)
    return get_model_state_dict(model, options=WHOLE)


@pytest.mark.exhaustive_if(condition=lambda order: order != next(iter(ORDERS)))
@pytest.mark.parametrize("order", ORDERS)
def test_a_checkpoint_of_two_ranks_is_read_by_four(order, processes, tmp_path):
    want = processes.run(2, write, folder=tmp_path, order=order)[0]
    got = processes.run(4, read, folder=tmp_path, order=order)[0]
    assert want
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.processes(2)
@pytest.mark.parametrize("order", ORDERS)
def test_resuming_equals_going_on(order, tmp_path):
    straight = train(ORDERS[order](pretrained()), steps=4)
    write(tmp_path, order)
    model = ORDERS[order](pretrained())
    optimizer = optimizer_of(model)
    state = checkpoint(model, optimizer)
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(model, state["model"], options=PARTIAL)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    resumed = train(model, steps=2, start=2, optimizer=optimizer)
    torch.testing.assert_close(resumed, straight[2:], rtol=0, atol=1e-7)


@pytest.mark.processes(2)
def test_accelerate_loads_on_the_first_rank_alone():
    """Its cpu_ram_efficient_loading: the other ranks have the model on the meta device."""
    from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict

    state = adapt(pretrained()).state_dict()
    model = adapt(pretrained()).to("meta")
    model = shard(model)
    accelerator = types.SimpleNamespace(
        is_main_process=dist.get_rank() == 0, device=torch.device("cpu")
    )
    fsdp2_load_full_state_dict(accelerator, model, state)
    for name, tensor in get_model_state_dict(model, options=WHOLE).items():
        assert torch.equal(tensor, state[name]), name
