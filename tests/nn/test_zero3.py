"""DeepSpeed's ZeRO-3 by its marks: parameters without numbers that bear attributes ds_..."""

import pytest
import torch
from torch import nn

import boft_ops


def put_away(parameter, number):
    """Make of a parameter what ZeRO-3 leaves between calls."""
    parameter.ds_id, parameter.ds_shape = number, parameter.shape
    parameter.data = torch.empty(0)


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(16, 8))
    for number, parameter in enumerate(model.parameters()):
        put_away(parameter, number)
    return model


def test_adapt_keeps_the_parameters_that_zero3_knows(model):
    weight, bias = model[0].weight, model[0].bias
    boft_ops.adapt(model, ["0"], block_size=4)
    assert model[0].frozen_weight is weight
    assert model[0].bias is bias
    assert not weight.requires_grad
    assert model[0].skew.shape == (2, 4, 6)
    assert model[0].scale_offset.shape == (8,)


def test_files_of_tensors_that_are_put_away_are_refused(model, tmp_path):
    path = tmp_path / "a.safetensors"
    whole = nn.Sequential(nn.Linear(16, 8))
    boft_ops.save_adapter(boft_ops.adapt(whole, ["0"], block_size=4), path)
    before = path.read_bytes()
    boft_ops.adapt(model, ["0"], block_size=4)
    put_away(model[0].skew, 2)
    message = (
        r"0\.skew: expected a whole tensor, got what DeepSpeed's ZeRO-3 leaves of it: .*Gathered"
    )
    with pytest.raises(ValueError, match=message):
        boft_ops.save_adapter(model, path)
    with pytest.raises(ValueError, match=message):
        boft_ops.load_adapter(model, path)
    assert path.read_bytes() == before
