"""Writes PEFT's checkpoints of BOFT, OFT and LoRA."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Hashable
from pathlib import Path

import torch

from ..._runtime.files import encode_safetensors, write_folder
from ...ops.dropout import count
from ..peft.parameters import TERMS, boft_blocks, oft_skew
from .checkpoint import Base, Checkpoint, LayerState, Shapes, shapes_of, tensors_of
from .peft_reader import CONFIG, PREFIX, WEIGHTS, within

BARE_LAYER = "PEFT expects layers inside a model, got an adapter of a bare layer"


def write(checkpoint: Checkpoint, path: Path, base: Base | None) -> None:
    """Write a folder of PEFT's BOFT, or of its OFT for one factor without a scale.

    Args:
        checkpoint: the adapter; PEFT has one configuration for all of its layers.
        path: the new folder.
        base: the pretrained model, which says what the modules to save consist of; or None.

    Raises:
        ValueError: PEFT has no such adapter; the message says why.
    """
    config, tensors = _convert(checkpoint, {} if base is None else shapes_of(base))
    _write_folder(checkpoint, path, base, config, tensors)


def write_lora(
    checkpoint: Checkpoint,
    path: Path,
    base: Base,
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]],
    rank: int,
) -> None:
    """Write a folder of PEFT's LoRA.

    Args:
        checkpoint: the adapter, whose further tensors are written, too.
        path: the new folder.
        base: as for ``write``.
        factors: by the names of the layers, A (rank, ...) and B (n, rank, ...), whose product is
            the update of the weight.
        rank: the number of rows of each A.

    Raises:
        ValueError: PEFT has no such adapter; the message says why.
    """
    tensors = {}
    for name, (a, b) in factors.items():
        if not name:
            raise ValueError(BARE_LAYER)
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0}
    _write_folder(checkpoint, path, base, config, tensors)


def _write_folder(
    checkpoint: Checkpoint,
    path: Path,
    base: Base | None,
    config: dict,
    tensors: dict[str, torch.Tensor],
) -> None:
    """Complete the config and the tensors of the layers with all else, and write them."""
    config |= _common(checkpoint, config["peft_type"], base)
    for name, tensor in checkpoint.others.items():
        module, _, last = name.rpartition(".")
        inner = f"{module}.base_layer.{last}" if module in checkpoint.layers else name
        tensors[PREFIX + inner] = tensor
    content = encode_safetensors(tensors, {"format": "pt"})
    write_folder(path, {CONFIG: json.dumps(config, indent=2).encode(), WEIGHTS: content})


def _convert(checkpoint: Checkpoint, shapes: Shapes) -> tuple[dict, dict[str, torch.Tensor]]:
    """The part of the config that depends on the method, and the tensors of the layers."""
    layers = checkpoint.layers
    for name, layer in layers.items():
        if layer.config.side == "out":
            raise ValueError(
                f"{name}: PEFT rotates the inputs of a layer, this adapter its outputs: in general "
                "no butterfly R' makes W R'^T equal to R W"
            )
        if not name:
            raise ValueError(BARE_LAYER)
    method = _same(layers, "method", lambda layer: layer.config.method)
    n_factors = _same(layers, "n_factors", lambda layer: layer.config.n_factors)
    if n_factors == 1 and all(layer.scale is None for layer in layers.values()):
        return _write_oft(layers, shapes, neumann=method == "neumann5")
    if method != "exact":
        raise ValueError(
            f"PEFT's BOFT has the exact Cayley transform alone, got method {method!r} with "
            "several factors or a scale"
        )
    return _write_boft(layers, n_factors)


def _same(
    layers: dict[str, LayerState], option: str, read: Callable[[LayerState], Hashable]
) -> Hashable:
    """The value of an option if it is the same in all layers, else ValueError."""
    names = {read(layer): name for name, layer in layers.items()}
    if len(names) > 1:
        (a, first), (b, second) = list(names.items())[:2]
        raise ValueError(
            f"PEFT has one {option} for all layers, got {a} in {first!r} and {b} in {second!r}"
        )
    return next(iter(names))


def _write_oft(
    layers: dict[str, LayerState], shapes: Shapes, *, neumann: bool
) -> tuple[dict, dict[str, torch.Tensor]]:
    tensors = {}
    for name, layer in layers.items():
        kernel = shapes.get(name, (0, 0, 0))[2:]
        if layer.layer_type == "Conv2d" and kernel != (1, 1):
            got = f"a kernel of {kernel}" if name in shapes else "none: expected base="
            raise ValueError(
                f"{name}: PEFT's OFT sums rotated patches of the image before it convolves them, "
                f"which rotates the weight of a kernel of (1, 1) alone, got {got}"
            )
        key = f"{PREFIX}{name}.oft_R.weight"
        tensors[key] = oft_skew(layer.skew[0], neumann=neumann)[0]  # oft_skew is its own inverse
    return {
        "peft_type": "OFT",
        "r": 0,
        "oft_block_size": _same(layers, "block_size", lambda layer: layer.config.block_size),
        "module_dropout": _same(layers, "dropout", _dropout),
        "use_cayley_neumann": neumann,
        "num_cayley_neumann_terms": TERMS,
        "peft_version": "0.18.0",  # the first version with these formulas
    }, tensors


def _write_boft(
    layers: dict[str, LayerState], n_factors: int
) -> tuple[dict, dict[str, torch.Tensor]]:
    tensors = {}
    for name, layer in layers.items():
        scale = layer.scale
        if layer.layer_type is None or (scale is None and layer.out_features is None):
            raise ValueError(
                f"{name}: PEFT shapes boft_s by the type of layer, which the file does not tell: "
                "expected base=, the pretrained model"
            )
        if scale is None:
            scale = torch.ones(layer.out_features)
        tensors[f"{PREFIX}{name}.boft_R"] = boft_blocks(layer.skew)
        shape = (1, -1) if layer.layer_type == "Conv2d" else (-1, 1)
        tensors[f"{PREFIX}{name}.boft_s"] = scale.reshape(shape)
    return {
        "peft_type": "BOFT",
        "boft_block_size": _same(layers, "block_size", lambda layer: layer.config.block_size),
        "boft_block_num": 0,
        "boft_n_butterfly_factor": n_factors,
        "boft_dropout": _same(layers, "dropout", _dropout),
    }, tensors


def _dropout(layer: LayerState) -> float:
    """PEFT's probability: the share of the blocks to drop in exactly one factor."""
    config = layer.config
    chosen = count(config.p_component, config.n_factors)
    if chosen > 1 and config.p_block:
        raise ValueError(
            f"PEFT drops blocks of one factor at a time, got p_component={config.p_component}, "
            f"which are {chosen} of {config.n_factors} factors"
        )
    return config.p_block if chosen else 0.0


def _common(checkpoint: Checkpoint, peft_type: str, base: Base | None) -> dict:
    """The part of the config that all methods have.

    Target modules are a regular expression of whole names, as PEFT matches the ends of names in a
    list.
    """
    others = checkpoint.others.keys()
    biases = {f"{name}.bias" for name in checkpoint.layers}
    return {
        "target_modules": "|".join(re.escape(name) for name in sorted(checkpoint.layers)),
        "modules_to_save": _modules_to_save(checkpoint, others - biases, base) or None,
        "bias": f"{peft_type.lower()}_only" if biases & others else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }


def _modules_to_save(
    checkpoint: Checkpoint, names: Collection[str], base: Base | None
) -> list[str]:
    """The modules that hold the tensors of these names, if PEFT can load them.

    PEFT saves whole modules with those inside them, asks a file for all of their tensors, and
    adapts no layer in them.
    """
    modules = {_parent(name) for name in names}
    if "" in modules:
        raise ValueError("PEFT saves whole modules, got a trained parameter of the model itself")
    saved = sorted(name for name in modules if not within(name, modules))
    for name in checkpoint.layers:
        if within(f"{name}.weight", saved):
            raise ValueError(
                f"{name}: PEFT adapts no layer in modules that it saves whole, all whose names end "
                f"like one of {saved}, got trained parameters of both"
            )
    base_tensors = {} if base is None else tensors_of(base)
    asked = {name for name in base_tensors if within(name, saved)}
    for name in saved:
        if not any(tensor.startswith(f"{name}.") for tensor in asked):
            asked |= {f"{name}.weight", f"{name}.bias"}  # the tensors of most modules
    if missing := sorted(asked - checkpoint.others.keys()):
        unless = "" if missing[0] in base_tensors else "; or base=, a model that has no such tensor"
        raise ValueError(
            f"PEFT saves whole modules, all whose names end like one of {saved}: expected a "
            f"trained {missing[0]!r}, too, got none{unless}"
        )
    return saved


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
