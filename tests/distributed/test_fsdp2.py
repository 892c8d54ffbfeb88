"""``fully_shard`` before and after ``adapt``: training equals one process."""

import pytest
import torch
import torch.distributed as dist
from distributed_models import adapt, pretrained, shard, train


def same_on_all_ranks(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            local = parameter.to_local().detach() if hasattr(parameter, "placements") else parameter
            parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
            if not any(p.is_shard() for p in getattr(parameter, "placements", ())):
                dist.all_gather(parts, local.detach())
                assert torch.equal(parts[0], parts[-1])


@pytest.mark.processes(2)
@pytest.mark.parametrize(
    "options", [{}, {"leaves": True}, {"reshard_after_forward": False}], ids=str
)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("order", ["adapt, shard", "shard, adapt"])
def test_training_equals_one_process(order, checkpointed, options):
    want = train(adapt(pretrained(checkpointed=checkpointed)), alone=True)
    model = pretrained(checkpointed=checkpointed)
    if order == "adapt, shard":
        model = shard(adapt(model), **options)
    else:
        model = adapt(shard(model, **options))
    got = train(model)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    same_on_all_ranks(model)
