"""Reads the files of trainers: LyCORIS, OneTrainer, and kohya's sd-scripts.

One file holds all networks that were trained together, such as a UNet and two text encoders. The
name of a tensor is the prefix of its network, the layer, and the parameter. Dots in the name of the
layer are kept (``unet.mid_block.conv.oft_R.weight``) or underscores (``lora_unet_mid_block_conv``).

What the parameters mean is told by their names, and each trainer has some of its own:

- ``oft_blocks``: LyCORIS (see ``lycoris``), and the first OFT of sd-scripts, which bounds the norm
  in another way and may have several parts for the outputs of one layer.
- ``oft_R.weight``: OneTrainer, and ``oft_v2`` of sd-scripts. Linear layers use W R^T, as PEFT does,
  convolutions W R.
- ``boft_R``, ``boft_s``: ``boft`` of sd-scripts, which is PEFT's formula.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch

from ..._runtime import checks
from ..._runtime.dtypes import widest
from ...ops.cayley import pack
from ..peft.parameters import boft_skew
from . import lycoris
from .checkpoint import Checkpoint, LayerState, Shapes, fitted
from .mangled import names_of, prefix_of
from .peft_reader import check_boft

Tensors = dict[str, torch.Tensor]

# The parameters of layers, by trainer.
OFT_V2, BOFT, OFT_PARTS = "oft_R.weight", "boft_R", re.compile(r"oft_blocks\.\d+")
PARTS = {
    "lycoris": ("oft_blocks", "rescale", "alpha"),
    "onetrainer": (OFT_V2, "oft_R.scaled_oft"),
    "sd-scripts": (OFT_V2, BOFT, "boft_s", "oft_blocks", "alpha"),
}
TRAINERS = tuple(PARTS)
_PART = re.compile(
    r"(.+)\.(oft_blocks|oft_blocks\.\d+|rescale|alpha|oft_R\.weight|oft_R\.scaled_oft|boft_R|boft_s)"
)


def trainers_of(tensors: Tensors, metadata: dict[str, str]) -> tuple[str, ...]:
    """The trainers that may have written a file, the likeliest first.

    Files of OneTrainer and of sd-scripts' oft_v2 can be equal, and mean the same. Those of LyCORIS'
    diag-oft and of sd-scripts' oft differ in a bound of 0.

    Args:
        tensors, metadata: the content of the file.
    """
    matches = [match for name in tensors if (match := _PART.fullmatch(name))]
    parts = {match[2] for match in matches}
    lists = any(map(OFT_PARTS.fullmatch, parts))
    if not lists and not parts & {"oft_blocks", OFT_V2, BOFT}:
        return ()
    if metadata.get("ss_network_module", "").startswith("networks.") or lists or BOFT in parts:
        return ("sd-scripts",)
    if "oft_R.scaled_oft" in parts:
        return ("onetrainer",)
    if OFT_V2 in parts:
        return ("onetrainer", "sd-scripts")
    if any(match[1].startswith("oft_") for match in matches):
        return ("sd-scripts", "lycoris")
    return ("lycoris", "sd-scripts")


def read(
    path: Path, tensors: Tensors, shapes: Shapes, prefix: str | None, trainer: str
) -> Checkpoint:
    """Build the checkpoint that computes the trainer's forward with multiplier 1.

    Constraints are applied to the parameters and not kept.

    Args:
        path: of the file, for messages.
        tensors: the content of the file.
        shapes: shapes of the pretrained model's weights, by the names of its modules.
        prefix: of the network to read; None reads the only one. Layers of other networks are left
            out, and one warning counts them.
        trainer: "lycoris", "onetrainer" or "sd-scripts".

    Raises:
        ValueError: a tensor is not valid, belongs to another method, or the names of layers are not
            those of one module each.
    """
    prefix, layers, left = _layers(path, tensors, prefix, trainer)
    if not shapes:
        raise ValueError(
            f"{path}: of trainers' names, such as {next(iter(layers))!r}, dots cannot be told from "
            "underscores, nor linear layers from convolutions: expected base=, the pretrained model"
        )
    underscored = {name: name.replace(".", "_") for name in layers}
    if len(set(underscored.values())) < len(layers):
        raise ValueError(f"{path}: expected one name for each layer, got dots and underscores")
    try:
        names = names_of(list(underscored.values()), shapes, prefix)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if left:
        warnings.warn(
            f"{path}: left out {left}, which are layers of other models: each is converted with "
            "its own prefix and base",
            stacklevel=2,
        )
    states, aliases = {}, {}
    for alias, parts in layers.items():
        name = names[underscored[alias]]
        state = _read_layer(f"{path}: {alias}", parts, shapes[name], trainer)
        states[name] = fitted(state, shapes[name], name)
        aliases[name] = alias
    return Checkpoint(states, aliases=aliases)


def _layers(
    path: Path, tensors: Tensors, prefix: str | None, trainer: str
) -> tuple[str, dict[str, Tensors], str]:
    """The prefix, the parameters of the layers with it, and a list of the layers without it."""
    prefix = prefix or _only_prefix(path, tensors)
    layers: dict[str, Tensors] = {}
    others: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        layer, part = match.groups() if match else (name, "")
        known = part in PARTS[trainer] or (trainer == "sd-scripts" and OFT_PARTS.fullmatch(part))
        starts = (f"{prefix}_", f"{prefix}.")
        if not layer.startswith(starts) and (other := prefix_of(name)):
            others.setdefault(other, set()).add(layer if match else name.partition(".")[0])
            continue
        # Names with dots have come with oft_R alone: ComfyUI's oft_blocks have another formula.
        if not known or not layer.startswith(starts if part.startswith("oft_R") else starts[:1]):
            raise ValueError(
                f"{path}: expected {prefix}_*.({'|'.join(PARTS[trainer])}) of {trainer}'s BOFT and "
                f"OFT alone, got {name!r}"
            )
        if not tensor.is_floating_point() and part not in ("alpha", "oft_R.scaled_oft"):
            raise ValueError(f"{path}: {name}: expected floating-point numbers, got {tensor.dtype}")
        layers.setdefault(layer, {})[part] = tensor
    left = _counted(others)
    if not layers:
        raise ValueError(f"{path}: expected {prefix}_* of the prefix {prefix!r}, got {left}")
    return prefix, layers, left


def _only_prefix(path: Path, tensors: Tensors) -> str:
    """The prefix of the one network of a file, or ValueError if there are several."""
    prefixes: dict[str, set[str]] = {}
    for name in tensors:
        if match := _PART.fullmatch(name):
            # LyCORIS' own prefix, after which "unet" is a part of the model's name
            own = name.startswith("lycoris_")
            prefixes.setdefault("lycoris" if own else prefix_of(name) or "", set()).add(match[1])
    if len(prefixes) == 1 and "" not in prefixes:
        return next(iter(prefixes))
    unknown = prefixes.pop("", None)
    got = f"{min(unknown)!r}" if unknown else _counted(prefixes)
    raise ValueError(
        f"{path}: expected layers of one known network, or prefix=, the prefix of their names, got "
        f"{got}"
    )


def _counted(layers: dict[str, set[str]]) -> str:
    """The prefixes with the numbers of their layers, for messages."""
    return ", ".join(
        f"{prefix}_* ({len(names)} layers)" for prefix, names in sorted(layers.items())
    )


def _read_layer(where: str, parts: Tensors, shape: tuple[int, ...], trainer: str) -> LayerState:
    if OFT_V2 in parts and parts.keys() <= {OFT_V2, "oft_R.scaled_oft"}:
        return _read_oft_v2(where, parts, shape)
    if parts.keys() == {BOFT, "boft_s"}:
        return _read_boft(where, parts)
    if trainer == "lycoris":
        if "oft_blocks" not in parts:
            raise ValueError(f"{where}: expected oft_blocks, got none")
        return lycoris.read_layer(where, parts)
    lists = [part for part in parts if OFT_PARTS.fullmatch(part)]
    if ("oft_blocks" in parts) == bool(lists) or "alpha" not in parts or BOFT in parts:
        raise ValueError(
            f"{where}: expected oft_R.weight, or boft_R and boft_s, or oft_blocks and alpha, got "
            f"{sorted(parts)}"
        )
    return _read_oft(where, parts, sorted(lists, key=lambda part: int(part[11:])) or ["oft_blocks"])


def _read_oft_v2(where: str, parts: Tensors, shape: tuple[int, ...]) -> LayerState:
    """The series I + 2Q + 2Q^2 + 2Q^3 + Q^4, which ``neumann5`` is.

    A convolution uses W R, and R for Q is the transpose of R for -Q: so W R is our W R^T for -Q.
    """
    weight = parts[OFT_V2]
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{where}: {OFT_V2}: expected (K, b(b-1)/2), got {tuple(weight.shape)}")
    block_size = checks.block_size_from_packed(OFT_V2, weight.shape[1])
    skew = weight.to(widest(weight.dtype))
    if (scaled := parts.get("oft_R.scaled_oft")) is not None:
        # A file that is stored in bfloat16 has this flag in bfloat16, too.
        if scaled.dtype in (torch.int32, torch.int64):
            raise ValueError(
                f"{where}: oft_R.scaled_oft: expected a flag, as OneTrainer has since the option "
                f"was released, got {scaled.dtype}: before, it divided by another number"
            )
        if scaled.numel() != 1 or scaled.item() != 1:
            raise ValueError(f"{where}: oft_R.scaled_oft: expected true, got {scaled}")
        skew = skew / (2 * (block_size - 1) ** 0.5)
    n_blocks = torch.Size(shape[1:]).numel() // block_size
    if len(skew) == 1:  # one block for all, or the only one
        skew = skew.repeat(max(1, n_blocks), 1)
    sign = -1 if len(shape) == 4 else 1
    return LayerState.from_tensors(sign * skew[None], method="neumann5")


def _read_boft(where: str, parts: Tensors) -> LayerState:
    """PEFT's BOFT, but boft_s is a column for convolutions, too."""
    matrix, scale = parts[BOFT], parts["boft_s"]
    check_boft(where, matrix, scale)
    skew = boft_skew(matrix.to(widest(matrix.dtype)))
    return LayerState.from_tensors(skew, scale.flatten().to(skew.dtype))


def _read_oft(where: str, parts: Tensors, names: list[str]) -> LayerState:
    """sd-scripts' first OFT, W' = R^T W with R = (I + Q)(I - Q)^-1.

    Args:
        where: the layer, for messages.
        parts: the parameters of the layer.
        names: the parameters that hold the blocks of consecutive outputs.
    """
    alpha = lycoris.read_alpha(where, parts["alpha"])
    skews = []
    for name in names:
        blocks = parts[name]
        shape = tuple(blocks.shape)
        if len(shape) != 3 or shape[1] != shape[2] or 0 in shape:
            raise ValueError(f"{where}: {name}: expected (K, b, b), got {shape}")
        blocks = blocks.to(widest(blocks.dtype))
        q = blocks - blocks.mT
        norm = torch.linalg.vector_norm(q)
        # Unlike LyCORIS', a bound of 0 is one.
        q = q * ((norm.clamp(max=alpha * shape[0] * shape[1]) + 1e-8) / (norm + 1e-8))
        skews.append(-pack(q) / 2)
    if len(sizes := {skew.shape[1] for skew in skews}) > 1:
        raise ValueError(
            f"{where}: expected blocks of one size in a layer, got parts of its outputs with "
            f"{len(sizes)} sizes"
        )
    return LayerState.from_tensors(torch.cat(skews)[None], side="out")
