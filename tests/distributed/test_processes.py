"""The pool of processes itself: results, errors, and groups of several sizes."""

import pytest
import torch
import torch.distributed as dist


def total(value):
    tensor = torch.tensor(value + dist.get_rank())
    dist.all_reduce(tensor)
    return tensor, dist.get_world_size()


def fail(rank):
    if dist.get_rank() == rank:
        raise ValueError("as asked")


@pytest.mark.processes(2)
@pytest.mark.parametrize("value", [1, 5])
def test_body_runs_on_every_rank(value, tmp_path):
    assert total(value) == (2 * value + 1, 2)
    (tmp_path / str(dist.get_rank())).touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == 2


def test_an_error_of_one_rank_is_raised_here(processes):
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2:.*ValueError: as asked"):
        processes.run(2, fail, rank=1)
    assert processes.run(2, total, value=0) == [(1, 2), (1, 2)]
