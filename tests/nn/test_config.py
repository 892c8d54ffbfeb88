"""RotationConfig: the options of all layers, checked once."""

import dataclasses
import inspect
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import boft_ops
from boft_ops import BOFTConv2d, BOFTLinear, MultiAdapterLinear, load_adapter, save_adapter
from boft_ops.nn.config import RotationConfig


@pytest.mark.parametrize("layer_class", [BOFTLinear, BOFTConv2d])
def test_the_defaults_of_the_constructors_are_those_of_the_config(layer_class):
    parameters = inspect.signature(layer_class).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert defaults == dataclasses.asdict(RotationConfig())


def test_options_are_attributes_of_a_layer():
    layer = BOFTLinear(16, 24, block_size=4, n_factors=1, side="out", method="neumann5")
    assert layer.config == RotationConfig(4, 1, "out", method="neumann5")
    values = layer.block_size, layer.n_factors, layer.side, layer.method, layer.kaleidoscope
    assert values == (4, 1, "out", "neumann5", 0)
    with pytest.raises(AttributeError):
        layer.block_size = 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.config.block_size = 8


def test_integers_of_numpy(tmp_path):
    options = {"block_size": np.int64(4), "n_factors": np.int32(2), "kaleidoscope": np.uint8(1)}
    config = RotationConfig(**options)
    assert [type(getattr(config, name)) for name in options] == [int] * 3
    assert json.loads(json.dumps(config.options())) == config.options()
    layer = MultiAdapterLinear(nn.Linear(16, 16))
    layer.add_adapter("a", block_size=np.int64(4))
    assert layer.adapters["a"].skew.shape == (2, 4, 6)
    model = boft_ops.adapt(nn.Sequential(nn.Linear(16, 16)), ["0"], **options)
    save_adapter(model, tmp_path / "a.safetensors")
    loaded = load_adapter(nn.Sequential(nn.Linear(16, 16)), tmp_path / "a.safetensors")
    assert loaded[0].config == model[0].config


@pytest.mark.parametrize(
    ("option", "error", "match"),
    [
        ({"block_size": True}, TypeError, "block_size: expected a positive int, got True"),
        ({"n_factors": 2.0}, TypeError, "n_factors: expected a positive int, got 2.0"),
        ({"n_factors": -1}, ValueError, "n_factors: expected a positive int, got -1"),
        ({"kaleidoscope": "1"}, TypeError, "kaleidoscope: expected an int, got '1'"),
        ({"kaleidoscope": 1, "n_factors": 1}, ValueError, "kaleidoscope: expected 0"),
        ({"scale": 1}, TypeError, "scale: expected a bool, got 1"),
        ({"p_component": 2}, ValueError, "p_component: expected a number in"),
        ({"p_block": "0"}, TypeError, "p_block: expected a number in"),
    ],
)
def test_options_that_fit_no_layer(option, error, match):
    with pytest.raises(error, match=match):
        RotationConfig(**option)


def test_names_of_options():
    options = RotationConfig().options()
    assert "kaleidoscope" not in options
    assert RotationConfig.mismatch(options) == []
    assert RotationConfig.mismatch({**options, "kaleidoscope": 2}) == []
    del options["side"]
    assert RotationConfig.mismatch({**options, "extra": 1}) == ["extra", "side"]


def test_changed_dropout_is_stored():
    layer = BOFTLinear(16, 16, p_component=0.5, p_block=0.25)
    layer.dropout.p_block = 0.5
    assert layer.options()["p_block"] == 0.5


@pytest.mark.parametrize(
    "name", [n for n in boft_ops.__all__ if isinstance(getattr(boft_ops, n), type)]
)
def test_public_classes_bear_the_name_of_the_package(name):
    assert getattr(boft_ops, name).__module__ == "boft_ops"


def test_layers_are_pickled_by_their_public_name():
    layer = BOFTLinear(16, 16)
    content = pickle.dumps(layer)
    assert b"boft_ops.nn.layers" not in content
    assert torch.equal(pickle.loads(content).weight, layer.weight)
