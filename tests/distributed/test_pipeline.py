"""Pipelines: traced into stages, where the raw operators are differentiated, and by hand."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_models import adapt, pretrained
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleavedZeroBubble,
    SplitPoint,
    pipeline,
)

MICROBATCHES = 4


def gradients(model):
    named = model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


def alone(x, target):
    model = adapt(pretrained())
    for rows, wanted in zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES)):
        F.mse_loss(model(rows), wanted).div(MICROBATCHES).backward()
    return gradients(model)


def batch():
    torch.manual_seed(7)
    return torch.randn(8, 3, 16), torch.randn(8, 3, 5)


@pytest.mark.processes(2)
@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
@pytest.mark.parametrize("schedule", [ScheduleGPipe, Schedule1F1B])
def test_traced_stages_train(schedule):
    x, target = batch()
    rank, model = dist.get_rank(), adapt(pretrained())
    split = {"blocks.1": SplitPoint.BEGINNING}
    pipe = pipeline(model, (x.chunk(MICROBATCHES)[0],), split_spec=split)
    stage = pipe.build_stage(rank, torch.device("cpu"))
    run = schedule(stage, MICROBATCHES, loss_fn=F.mse_loss)
    run.step(*((x,) if rank == 0 else ()), **({"target": target} if rank else {}))
    want, got = alone(x, target), gradients(stage.submod)
    assert sum("skew" in name for name in got) == (2 if rank == 0 else 4)
    torch.testing.assert_close(got, {name: want[name] for name in got}, rtol=1e-4, atol=1e-6)


class Part(torch.nn.Module):
    """Some blocks of the model, under their own names, and maybe the head."""

    def __init__(self, model, blocks, with_head):
        super().__init__()
        self.blocks = torch.nn.ModuleDict({str(i): model.blocks[i] for i in blocks})
        self.head = model.head if with_head else torch.nn.Identity()

    def forward(self, x):
        for block in self.blocks.values():
            x = block(x)
        return self.head(x)


@pytest.mark.processes(2)
def test_stages_by_hand_train_with_zero_bubbles():
    """The gradients of x and of the weights are asked for apart, and come out of one operator."""
    x, target = batch()
    rank, model = dist.get_rank(), adapt(pretrained())
    parts = {0: Part(model, [0], False), 1: Part(model, [1], False)}
    parts |= {2: Part(model, [2], False), 3: Part(model, [], True)}
    stages = [PipelineStage(parts[i], i, 4, torch.device("cpu")) for i in parts if i % 2 == rank]
    run = ScheduleInterleavedZeroBubble(stages, MICROBATCHES, loss_fn=F.mse_loss)
    run.step(*((x,) if rank == 0 else ()), **({"target": target} if rank else {}))
    want, count = alone(x, target), 0
    for stage in stages:
        for name, grad in gradients(stage.submod).items():
            torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-6)
            count += 1
    assert count == (8 if rank == 0 else 6)
