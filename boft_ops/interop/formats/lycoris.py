"""Reads and writes LyCORIS' checkpoints of BOFT and diag-oft.

A checkpoint is one file with tensors named after the layers, with underscores for the dots (see
``mangled``).
Both methods rotate the outputs: W' = rescale * R W.
LyCORIS' BOFT interleaves the two chunks of a block.
Its constraint ("alpha") bounds the norm of all blocks of a layer together.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..._runtime.files import encode_safetensors, write_whole
from ...ops.cayley import pack, unpack
from .checkpoint import Checkpoint, LayerState
from .mangled import alias_of

PREFIX = "lycoris"  # LyCORIS' own prefix of the names of layers; trainers use others


def read_layer(where: str, parts: dict[str, torch.Tensor]) -> LayerState:
    """Build the state of a layer that computes LyCORIS' forward with multiplier 1.

    The constraint is applied to the blocks and not kept.

    Args:
        where: the layer, for messages.
        parts: ``oft_blocks``, and ``rescale`` and ``alpha`` if there are any.

    Raises:
        ValueError: a tensor is not valid.
    """
    blocks = parts["oft_blocks"]
    shape = tuple(blocks.shape)
    if len(shape) not in (3, 4) or shape[-1] != shape[-2] or 0 in shape:
        raise ValueError(
            f"{where}: oft_blocks: expected (m, K, b, b) of BOFT or (K, b, b) of diag-oft, got "
            f"{shape}"
        )
    if len(shape) == 4 and shape[-1] % 2:
        raise ValueError(f"{where}: oft_blocks: expected an even block size in BOFT, got {shape}")
    blocks = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
    q = blocks - blocks.mT
    constraint = read_alpha(where, parts.get("alpha")) * shape[-3] * shape[-1]
    if constraint > 0:
        norm = torch.linalg.vector_norm(q) + 1e-8
        if norm > constraint:
            q = q * constraint / norm
    if len(shape) == 4:
        order = _interleaved(shape[-1]).argsort()
        skew = pack(q[..., order, :][..., order]) / 2
    else:
        skew = -pack(q)[None] / 2
    scale = parts.get("rescale")
    if scale is not None:
        if scale.dim() == 0 or scale.numel() != len(scale):
            raise ValueError(f"{where}: rescale: expected (n, 1, ...), got {tuple(scale.shape)}")
        scale = scale.flatten().to(skew.dtype)
    return LayerState.from_tensors(skew, scale, side="out")


def read_alpha(where: str, alpha: torch.Tensor | None) -> float:
    """Return the number in ``alpha``, 0 if there is none, or raise ValueError."""
    if alpha is None:
        return 0.0
    one = alpha.numel() == 1 and not alpha.is_complex()
    value = float(alpha) if one else float("nan")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{where}: alpha: expected one number >= 0, got {alpha}")
    return value


def _interleaved(block_size: int) -> torch.Tensor:
    """The element of a block here, (p mod 2) * b/2 + p div 2, for each position p in LyCORIS."""
    position = torch.arange(block_size)
    return position % 2 * (block_size // 2) + position // 2


def write(checkpoint: Checkpoint, path: Path, prefix: str | None) -> None:
    """Write BOFT for several factors, else diag-oft.

    Args:
        checkpoint: the adapter.
        path: the new file.
        prefix: of the names of layers. None keeps the names of a trainer's file, and is "lycoris"
            for other sources.

    Raises:
        ValueError: LyCORIS could not load the checkpoint; the message says why.
    """
    if checkpoint.others:
        other = next(iter(checkpoint.others))
        raise ValueError(f"LyCORIS has no place for further trained tensors, got {other!r}")
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in checkpoint.layers.items():
        mangled = alias_of(checkpoint, name, prefix, PREFIX)
        if f"{mangled}.oft_blocks" in tensors:
            raise ValueError(f"{name}: another layer's name is {mangled!r} in LyCORIS, too")
        tensors[f"{mangled}.oft_blocks"] = _write_layer(name, layer)
        tensors[f"{mangled}.alpha"] = torch.tensor(0.0)  # no constraint
        if layer.scale is not None:
            n_dims = {"Linear": 2, "Conv2d": 4}.get(layer.layer_type)
            if n_dims is None:
                raise ValueError(
                    f"{name}: LyCORIS shapes rescale by the type of layer, which the file does not "
                    "tell: expected base=, the pretrained model"
                )
            tensors[f"{mangled}.rescale"] = layer.scale.reshape(-1, *[1] * (n_dims - 1))
    write_whole(path, encode_safetensors(tensors, {"format": "pt"}))


def _write_layer(name: str, layer: LayerState) -> torch.Tensor:
    m, n_blocks, b = len(layer.skew), layer.skew.shape[1], layer.config.block_size
    if layer.config.side == "in":
        raise ValueError(
            f"{name}: LyCORIS rotates the outputs of a layer, this adapter its inputs: in general "
            "no butterfly R' makes R' W equal to W R^T"
        )
    if layer.config.method != "exact":
        raise ValueError(
            f"{name}: LyCORIS has the exact Cayley transform alone, got {layer.config.method!r}"
        )
    if m == 1 and b <= n_blocks:
        return -unpack(layer.skew[0]) / 2
    if m == 1 and (b % 2 or n_blocks & (n_blocks - 1)):
        raise ValueError(
            f"{name}: LyCORIS' diag-oft has no blocks larger than their number, and its BOFT takes "
            f"a power of two of even ones, got {n_blocks} of size {b}"
        )
    if n_blocks & (n_blocks - 1):
        raise ValueError(
            f"{name}: LyCORIS' BOFT takes a power of two of blocks, got {n_blocks} of size {b}"
        )
    # LyCORIS always has the largest possible number of factors: the missing ones are the identity.
    order, q = _interleaved(b), unpack(layer.skew)
    blocks = q.new_zeros(n_blocks.bit_length(), n_blocks, b, b)
    blocks[:m] = q[..., order, :][..., order] / 2
    return blocks
