"""Writes PEFT's checkpoints of BOFT and OFT."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Hashable
from pathlib import Path

import torch

from ...ops.dropout import count
from ..peft.parameters import TERMS, boft_blocks, oft_skew
from .adapter import Adapter, Base, LayerAdapter, tensors_of
from .files import write_folder
from .peft_reader import CONFIG, PREFIX, WEIGHTS


def write(adapter: Adapter, path: Path, base: Base | None) -> None:
    """BOFT, or OFT for one factor without a scale; PEFT has one configuration for all layers."""
    config, tensors = _convert(adapter)
    config |= _common(adapter, config["peft_type"], base)
    for name, tensor in adapter.others.items():
        module, _, last = name.rpartition(".")
        inner = f"{module}.base_layer.{last}" if module in adapter.layers else name
        tensors[PREFIX + inner] = tensor
    from safetensors.torch import save

    content = save({n: t.contiguous() for n, t in tensors.items()}, {"format": "pt"})
    write_folder(path, {CONFIG: json.dumps(config, indent=2).encode(), WEIGHTS: content})


def _convert(adapter: Adapter) -> tuple[dict, dict[str, torch.Tensor]]:
    layers = adapter.layers
    for name, layer in layers.items():
        if layer.side == "out":
            raise ValueError(
                f"{name}: PEFT rotates the inputs of a layer, this adapter its outputs: R W is no "
                "W R^T for any other rotation of that kind"
            )
        if not name:
            raise ValueError("PEFT expects layers inside a model, got an adapter of a bare layer")
    method = _same(layers, "method", lambda layer: layer.method)
    n_factors = _same(layers, "n_factors", lambda layer: layer.n_factors)
    if n_factors == 1 and all(layer.scale is None for layer in layers.values()):
        return _write_oft(layers, neumann=method == "neumann5")
    if method != "exact":
        raise ValueError(
            f"PEFT's BOFT has the exact Cayley transform alone, got method {method!r} with "
            "several factors or a scale"
        )
    return _write_boft(layers, n_factors)


def _same(
    layers: dict[str, LayerAdapter], what: str, of: Callable[[LayerAdapter], Hashable]
) -> Hashable:
    found = {of(layer): name for name, layer in layers.items()}
    if len(found) > 1:
        (a, first), (b, second) = list(found.items())[:2]
        raise ValueError(
            f"PEFT has one {what} for all layers, got {a} in {first!r} and {b} in {second!r}"
        )
    return next(iter(found))


def _write_oft(
    layers: dict[str, LayerAdapter], *, neumann: bool
) -> tuple[dict, dict[str, torch.Tensor]]:
    tensors = {}
    for name, layer in layers.items():
        key = f"{PREFIX}{name}.oft_R.weight"
        tensors[key] = oft_skew(layer.skew[0], neumann=neumann)[0]  # its own inverse
    return {
        "peft_type": "OFT",
        "r": 0,
        "oft_block_size": _same(layers, "block_size", lambda layer: layer.block_size),
        "module_dropout": _same(layers, "dropout", _dropout),
        "use_cayley_neumann": neumann,
        "num_cayley_neumann_terms": TERMS,
        "peft_version": "0.18.0",  # the first whose formulas these are
    }, tensors


def _write_boft(
    layers: dict[str, LayerAdapter], n_factors: int
) -> tuple[dict, dict[str, torch.Tensor]]:
    tensors = {}
    for name, layer in layers.items():
        scale = layer.scale
        if layer.kind is None or (scale is None and layer.out_features is None):
            raise ValueError(
                f"{name}: PEFT shapes boft_s by the kind of layer, which the file does not tell: "
                "expected base=, the pretrained model"
            )
        if scale is None:
            scale = torch.ones(layer.out_features)
        tensors[f"{PREFIX}{name}.boft_R"] = boft_blocks(layer.skew)
        shape = (1, -1) if layer.kind == "Conv2d" else (-1, 1)
        tensors[f"{PREFIX}{name}.boft_s"] = scale.reshape(shape)
    return {
        "peft_type": "BOFT",
        "boft_block_size": _same(layers, "block_size", lambda layer: layer.block_size),
        "boft_block_num": 0,
        "boft_n_butterfly_factor": n_factors,
        "boft_dropout": _same(layers, "dropout", _dropout),
    }, tensors


def _dropout(layer: LayerAdapter) -> float:
    """PEFT's one probability: of the blocks, in exactly one factor."""
    chosen = count(layer.p_component, layer.n_factors)
    if chosen > 1 and layer.p_block:
        raise ValueError(
            f"PEFT drops blocks of one factor at a time, got p_component={layer.p_component}, "
            f"which are {chosen} of {layer.n_factors} factors"
        )
    return layer.p_block if chosen else 0.0


def _common(adapter: Adapter, peft_type: str, base: Base | None) -> dict:
    """Target modules as a regular expression of whole names: of a list PEFT matches the ends."""
    biases = {f"{name}.bias" for name in adapter.layers}
    return {
        "target_modules": "|".join(re.escape(name) for name in sorted(adapter.layers)),
        "modules_to_save": _modules_to_save(adapter, adapter.others.keys() - biases, base) or None,
        "bias": f"{peft_type.lower()}_only" if biases & adapter.others.keys() else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }


def _modules_to_save(adapter: Adapter, names: Collection[str], base: Base | None) -> list[str]:
    """The modules of further tensors of these names, if they are what PEFT will ask the file for.

    It saves whole modules, those inside of them included, and adapts no layer in there.
    """
    modules = {_parent(name) for name in names}
    if "" in modules:
        raise ValueError("PEFT saves whole modules, got a trained parameter of the model itself")
    saved = sorted(name for name in modules if not _within(_parent(name), modules))
    for name in adapter.layers:
        if _within(name, saved):
            raise ValueError(
                f"{name}: PEFT adapts no layer in modules that it saves whole, all whose names end "
                f"like one of {saved}, got trained parameters of both"
            )
    known = {} if base is None else tensors_of(base)
    asked = {name for name in known if _within(_parent(name), saved)}
    for name in saved:
        if not any(tensor.startswith(f"{name}.") for tensor in asked):
            asked |= {f"{name}.weight", f"{name}.bias"}  # as most modules have
    if missing := sorted(asked - adapter.others.keys()):
        unless = "" if missing[0] in known else "; or base=, a model that has no such tensor"
        raise ValueError(
            f"PEFT saves whole modules, all whose names end like one of {saved}: expected a "
            f"trained {missing[0]!r}, too, got none{unless}"
        )
    return saved


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _within(name: str, saved: Collection[str]) -> bool:
    """Whether PEFT takes this module, or one around it, for one of ``saved``: it compares ends."""
    parts = f"{PREFIX}{name}".rstrip(".").split(".")
    around = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return any(module.endswith(tuple(saved)) for module in around)
