"""Reads PEFT's checkpoints of BOFT and OFT: folders with adapter_config.json and adapter_model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from ..peft.parameters import TERMS, boft_skew, oft_skew
from .checkpoint import Checkpoint, LayerState, Shapes, fitted
from .files import read_json, read_tensors

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
FACTORS = "boft_n_butterfly_factor"
# The options that say the shape of boft_R (m, K, b, b), with PEFT's defaults.
SIZES = {FACTORS: 1, "boft_block_num": 0, "boft_block_size": 4}
# PEFT's names of tuners' parameters (oft_R.weight, boft_P, lora_A.weight), where they have their
# place, at the end of a name. Names of users' modules are not looked at.
_TUNED = re.compile(r"(^|\.)(boft|oft|lora)_[A-Za-z_]+(\.weight)?$")


def read(path: Path, shapes: Shapes) -> Checkpoint:
    """Read a checkpoint folder; the result computes PEFT's forward pass.

    Args:
        path: the folder.
        shapes: shapes of the pretrained model's weights, by the names of its modules; may be empty.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: a file is spoiled, or the adapter has no equal here (see ``_read_oft``).
    """
    config = read_json(path / CONFIG)
    peft_type = config.get("peft_type")
    if peft_type not in ("BOFT", "OFT"):
        raise ValueError(f"{path}: expected peft_type BOFT or OFT, got {peft_type!r}")
    if config.get("fan_in_fan_out"):
        raise ValueError(
            f"{path}: expected fan_in_fan_out false, got true: boft_ops has no layer for a Conv1D"
        )
    weights = path / WEIGHTS
    tensors, _ = read_tensors(weights if weights.is_file() else path / PICKLE)
    tensors = {_without_prefix(path, name): t for name, t in tensors.items()}
    names = _names_of_saved(path, config)
    saved = {n: t for n, t in tensors.items() if ".modules_to_save." in n or within(n, names)}
    tuned = {n: t for n, t in tensors.items() if n not in saved}
    if peft_type == "BOFT":
        layers = _read_boft(path, config, tuned)
    else:
        layers = _read_oft(path, config, tuned, shapes)
    layers = {name: fitted(layer, shapes.get(name), name) for name, layer in layers.items()}
    if foreign := next(filter(_TUNED.search, tuned), None):
        raise ValueError(
            f"{path}: expected parameters of linear layers and convolutions, got {foreign!r}"
        )
    # in the order of the file
    others = {n: t for n, t in tensors.items() if n in saved or n in tuned}
    return Checkpoint(layers, _read_others(path, others))


def _names_of_saved(path: Path, config: dict) -> list[str]:
    """The names, or ends of names, of the modules that were trained as a whole."""
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"{path}: modules_to_save: expected a list of names, got {names!r}")
    return names


def within(name: str, saved: Collection[str]) -> bool:
    """True if PEFT takes a module that holds this tensor or module for one of ``saved``.

    PEFT compares the ends of modules' names.
    """
    parts = f"{PREFIX}{name}".split(".")
    modules = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(module.endswith(tuple(saved)) for module in modules)


def _without_prefix(path: Path, name: str) -> str:
    if not name.startswith(PREFIX):
        raise ValueError(f"{path}: expected tensors of {PREFIX}*, got {name!r}")
    return name.removeprefix(PREFIX)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"expected floating-point numbers, got {tensor.dtype}")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _take(path: Path, tensors: dict[str, torch.Tensor], suffix: str) -> dict[str, torch.Tensor]:
    """Remove the tensors whose names end in ``suffix``, and return them by their modules' names."""
    taken = {}
    for name in [n for n in tensors if n.endswith(suffix)]:
        try:
            taken[name.removesuffix(suffix)] = _widened(tensors.pop(name))
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
    return taken


def _option(path: Path, config: dict, key: str, option_type: type, default: object) -> object:
    """The value of ``key`` as an int, float or bool, or ValueError."""
    value = config.get(key, default)
    accepted = (int, float) if option_type is float else option_type
    if isinstance(value, accepted) and (option_type is bool or not isinstance(value, bool)):
        try:
            return option_type(value)
        except OverflowError:  # an integer too large for a float
            pass
    raise ValueError(f"{path}: {key}: expected a {option_type.__name__}, got {value!r}")


def _read_boft(path: Path, config: dict, tensors: dict[str, torch.Tensor]) -> dict[str, LayerState]:
    """Read BOFT's layers, and remove their tensors from ``tensors``."""
    p_block = _option(path, config, "boft_dropout", float, 0.0)
    sizes = {key: _option(path, config, key, int, default) for key, default in SIZES.items()}
    matrices, scales = _take(path, tensors, ".boft_R"), _take(path, tensors, ".boft_s")
    if single := sorted(matrices.keys() ^ scales.keys()):
        raise ValueError(
            f"{path}: expected boft_R and boft_s of each layer, got one of {single[0]!r}"
        )
    if _is_lowered(sizes, matrices.values()):
        warnings.warn(
            f"{path}: n_factors is 1, as in the tensors, not {sizes[FACTORS]} as in the config: "
            "PEFT lowered it where its CUDA extension could not be built",
            stacklevel=2,
        )
        sizes[FACTORS] = 1
    layers = {}
    for name, matrix in matrices.items():
        # PEFT 0.9 to 0.12 saved its permutation, too, which follows from the sizes.
        tensors.pop(f"{name}.boft_P", None)
        shape, scale = tuple(matrix.shape), scales[name]
        check_boft(f"{path}: {name}", matrix, scale)
        _check_sizes(f"{path}: {name}", sizes, shape)
        layer_type = "Linear" if scale.shape[1] == 1 else "Conv2d"
        layers[name] = LayerState.from_tensors(
            boft_skew(matrix),
            scale.flatten(),
            p_component=_share_of_one(shape[0]) if p_block else 0.0,  # PEFT: exactly one factor
            p_block=p_block,
            layer_type=None if scale.numel() == 1 else layer_type,  # (1, 1) may be either
            out_features=scale.numel(),
        )
    return layers


def check_boft(where: str, matrix: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise ValueError unless these are a boft_R and a boft_s of one layer; ``where`` names it."""
    shape = tuple(matrix.shape)
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
        raise ValueError(f"{where}: boft_R: expected (m, K, b, b), got {shape}")
    if scale.dim() != 2 or 1 not in scale.shape:
        raise ValueError(
            f"{where}: boft_s: expected (n, 1), or (1, n) of a convolution, got "
            f"{tuple(scale.shape)}"
        )


def _check_sizes(where: str, sizes: dict[str, int], shape: tuple[int, ...]) -> None:
    for (key, size), got in zip(sizes.items(), shape[:3], strict=True):
        # PEFT takes the size or the number of blocks, and 0 for the other.
        if size != got and (size or key == FACTORS):
            raise ValueError(f"{where}: {key}: the config says {size}, the shape of boft_R {got}")


def _is_lowered(sizes: dict[str, int], matrices: Iterable[torch.Tensor]) -> bool:
    """True if PEFT made one factor where more were asked for, as it does without its extension."""
    return sizes[FACTORS] > 1 and all(matrix.shape[:1] == (1,) for matrix in matrices)


def _share_of_one(n_factors: int) -> float:
    """A p_component that chooses one of n_factors factors, whatever the rounding."""
    return min(1.0, 1.5 / n_factors)


def _read_oft(
    path: Path, config: dict, tensors: dict[str, torch.Tensor], shapes: Shapes
) -> dict[str, LayerState]:
    """Read OFT's layers, and remove their tensors from ``tensors``.

    A layer that this package cannot parametrize is a ValueError with the reason.
    """
    neumann = _option(path, config, "use_cayley_neumann", bool, True)
    if neumann:
        terms = _option(path, config, "num_cayley_neumann_terms", int, TERMS)
        if terms != TERMS:
            raise ValueError(
                f"{path}: num_cayley_neumann_terms: expected {TERMS}, which neumann5 is, got "
                f"{terms}: no Cayley transform gives these blocks, which are not orthogonal"
            )
        _check_version(path, config.get("peft_version", "0"))
    coft = _option(path, config, "coft", bool, False)
    eps = _option(path, config, "eps", float, 6e-5)
    share = _option(path, config, "block_share", bool, False)
    p_block = _option(path, config, "module_dropout", float, 0.0)
    layers = {}
    for name, weight in _take(path, tensors, ".oft_R.weight").items():
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(
                f"{path}: {name}: oft_R: expected (K, b(b-1)/2), got {tuple(weight.shape)}"
            )
        shape = shapes.get(name)
        if shape is not None and len(shape) == 4 and shape[2:] != (1, 1):
            raise ValueError(
                f"{path}: {name}: PEFT's OFT sums rotated patches of the image before it convolves "
                f"them, with a kernel of {shape[2:]}: that is no rotation of the weight"
            )
        if coft:
            weight = _constrained(weight, eps)
        layer = LayerState.from_tensors(
            oft_skew(weight, neumann=neumann),
            method="neumann5" if neumann else "exact",
            p_component=1.0 if p_block and not share else 0.0,
            p_block=0.0 if share else p_block,
        )
        if share:
            layer = _repeated(path, name, layer, shape)
        layers[name] = layer
    return layers


def _check_version(path: Path, version: object) -> None:
    match = re.match(r"(\d+)\.(\d+)", version if isinstance(version, str) else "")
    if match is None or (int(match[1]), int(match[2])) < (0, 18):
        raise ValueError(
            f"{path}: peft_version: expected 0.18 or later with use_cayley_neumann, got "
            f"{version!r}: earlier versions compute another series"
        )


def _constrained(weight: torch.Tensor, eps: float) -> torch.Tensor:
    """COFT: bound the norm of each block by eps / sqrt(K), as PEFT's forward does."""
    limit = eps / len(weight) ** 0.5
    norm = (2 * weight.square().sum(1, keepdim=True)).sqrt()  # counts both triangles
    return torch.where(norm <= limit, weight, weight * (limit / norm))


def _repeated(
    path: Path, name: str, layer: LayerState, shape: tuple[int, ...] | None
) -> LayerState:
    """Repeat the one block of block_share for all features of the weight."""
    if layer.skew.shape[1] != 1:
        raise ValueError(
            f"{path}: {name}: expected one block with block_share, got {layer.skew.shape[1]}"
        )
    if shape is None:
        raise ValueError(
            f"{path}: {name}: with block_share the file does not say how many blocks there are: "
            "expected base=, the pretrained model"
        )
    n_blocks = torch.Size(shape[1:]).numel() // layer.config.block_size
    return replace(layer, skew=layer.skew.expand(-1, n_blocks, -1).contiguous())


def _read_others(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The further tensors, by their names in the pretrained model."""
    others = {}
    for name, tensor in tensors.items():
        if ".original_module." in name:  # the frozen copy that bias="all" stores as well
            continue
        original = name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        # bias="all" stores what modules_to_save trained under both names
        if original in others and not torch.equal(others[original], tensor):
            raise ValueError(
                f"{path}: expected one {original!r}, got two that differ, {name!r} too"
            )
        others[original] = tensor
    return others
