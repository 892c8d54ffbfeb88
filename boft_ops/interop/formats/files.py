"""Readers for files of unknown origin: they run none of the code in a file."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..._runtime.checks import FLOATING
from ..._runtime.files import open_safetensors

MAX_JSON = 16 << 20  # bytes


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file, or of a pickle without metadata.

    Files that end in .bin, .pt, .pth or .ckpt are pickles. They are read with
    ``weights_only=True``, so that none of their code runs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or spoiled, or holds anything but plain tensors of
            integers and of floating-point numbers of at least 16 bits.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a file, got {str(path)!r}")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        tensors, metadata = _read_pickle(path), {}
    else:
        with open_safetensors(path) as file:
            names, metadata = file.keys(), file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in FLOATING:
            raise ValueError(
                f"{path}: {name}: expected floating-point numbers of 16 to 64 bits, got "
                f"{tensor.dtype}"
            )
    return tensors, metadata


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file can raise anything in the reader
        raise ValueError(
            f"{path}: not a file of tensors alone: torch.load(weights_only=True) refuses it "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not _owns_storage(value):
            raise ValueError(f"{path}: expected names with plain tensors, got {name!r}")
    return dict(loaded)


def _owns_storage(value: object) -> bool:
    """True for a plain CPU tensor whose storage is as large as its elements need.

    A small file could otherwise hold an expanded view that claims any amount of memory.
    """
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def read_json(path: Path) -> dict:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is larger than 16 MiB, is no JSON, or holds no object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a file, got {str(path)!r}")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path}: expected at most {MAX_JSON} bytes of JSON")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, or too deep
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
