"""Adapter files: one safetensors file with the trained tensors and the options of the layers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from .._runtime import files
from .._runtime.dtypes import COMPUTE
from ..ops.scale import offset_of
from .config import Options, RotationConfig
from .wrappers import dotted

FORMAT = "boft_ops"
FORMAT_VERSION = 2  # version 1 stored the scale, version 2 stores the scale minus one


class Adapter(NamedTuple):
    """The content of an adapter file.

    Attributes:
        layers: the options of each rotated layer, by its name in the pretrained model.
        bases: class name of torch's layer ("Linear", "Conv2d") and number of outputs, by name; a
            file may leave them out.
        tensors: by their names in the pretrained model: skew and scale_offset of each layer, and
            what else was trained.
    """

    layers: dict[str, Options]
    bases: dict[str, tuple[str, int]]
    tensors: dict[str, torch.Tensor]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; an existing one is replaced in one step and keeps its permissions.

        Raises:
            ValueError: ``path`` is a device, a FIFO or a folder.
            OSError: the file cannot be written.
        """
        write_adapter(Path(path), *self)


def write_adapter(
    path: Path,
    layer_options: dict[str, Options],
    bases: dict[str, tuple[str, int]],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Write an adapter file.

    Args:
        path: file to write.
        layer_options: the options of each layer, by its name.
        bases: class name of torch's layer ("Linear", "Conv2d") and number of outputs, by name.
        tensors: by their names in the pretrained model.

    Raises:
        ValueError: ``path`` is a device, a FIFO or a folder.
    """
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "layers": json.dumps(layer_options, sort_keys=True),
        "bases": json.dumps(bases, sort_keys=True),
    }
    files.write_whole(path, files.encode_safetensors(tensors, metadata))


def read_adapter(path: Path) -> Adapter:
    """Read a file of ``save_adapter``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, not of this package, or of a newer format version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a file, got {str(path)!r}")
    with files.open_safetensors(path) as file:
        metadata = file.metadata() or {}
        layer_options = parse_metadata(path, metadata)
        try:
            bases = dict(json.loads(metadata.get("bases", "{}")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: expected the layers' bases as JSON: {error}") from error
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Adapter(layer_options, bases, with_offsets(metadata, layer_options, tensors))


def with_offsets(
    metadata: dict[str, str], layers: Iterable[str], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of a file, in which the scales of version 1 have become offsets from one.

    Args:
        metadata: that ``parse_metadata`` has checked.
        layers: names of the rotated layers.
        tensors: of the file, by name; not changed.

    Raises:
        ValueError: a scale or an offset is no tensor of a dtype that layers have.
    """
    stored = "scale_offset" if int(metadata["format_version"]) > 1 else "scale"
    tensors = dict(tensors)
    for name in layers:
        key = dotted(name, stored)
        if (number := tensors.get(key)) is None:
            continue
        if number.dtype not in COMPUTE:
            raise ValueError(
                f"{key}: expected float64, float32, bfloat16 or float16, got {number.dtype}"
            )
        if stored == "scale":
            offset = dotted(name, "scale_offset")
            if offset in tensors:
                raise ValueError(
                    f"{offset}: expected format version 2 of a file that holds it, got 1"
                )
            tensors[offset] = offset_of(tensors.pop(key))
    return tensors


def parse_metadata(path: Path, metadata: dict[str, str]) -> dict[str, Options]:
    """Read the options of each layer from the metadata of an adapter file.

    The names of the options are checked, not yet their values.

    Raises:
        ValueError: the file is not of this package, of a newer format version, or spoiled.
    """
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected a {FORMAT} adapter, got a safetensors file of format "
            f"{metadata.get('format')!r}"
        )
    version = metadata.get("format_version", "")
    if version not in map(str, range(1, FORMAT_VERSION + 1)):
        raise ValueError(f"{path}: expected format version up to {FORMAT_VERSION}, got {version!r}")
    try:
        layer_options = json.loads(metadata.get("layers", ""))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected the layers' options as JSON: {error}") from error
    is_dict = isinstance(layer_options, dict)
    if not is_dict or not all(isinstance(v, dict) for v in layer_options.values()):
        raise ValueError(f"{path}: expected layers with their options, got {layer_options!r}")
    for name, options in layer_options.items():
        if mismatch := RotationConfig.mismatch(options):
            raise ValueError(f"{path}: {name}: unknown or missing options {mismatch}")
    return layer_options
