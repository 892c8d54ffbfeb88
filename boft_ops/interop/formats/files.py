"""Files of tensors from anywhere: read without running any of their code, written whole or not."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

import torch

from ..._runtime.checks import FLOATING

MAX_JSON = 16 << 20  # bytes


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file, or of a .bin, .pt, .pth or .ckpt one, and the metadata.

    The latter are pickles and are read with ``weights_only=True`` alone: no code of theirs runs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, spoiled, or holds something else than plain tensors, be it floating
            point of 8 bits.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a file, got {str(path)!r}")
    tensors, metadata = _read(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in FLOATING:
            raise ValueError(
                f"{path}: {name}: expected floating-point numbers of 16 to 64 bits, got "
                f"{tensor.dtype}"
            )
    return tensors, metadata


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return _read_pickle(path), {}
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {n: file.get_tensor(n) for n in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # SafetensorError, and what dtypes that torch lacks lead to
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile file makes the reader stumble over
        raise ValueError(
            f"{path}: not a file of tensors alone: torch.load(weights_only=True) refuses it "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise ValueError(f"{path}: expected names with plain tensors, got {name!r}")
    return dict(loaded)


def _is_plain(value: object) -> bool:
    """A tensor with memory of its own behind every element: no view may claim more."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def read_json(path: Path) -> dict:
    """A JSON file that holds an object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: too large, no JSON, or something else than an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a file, got {str(path)!r}")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path}: expected at most {MAX_JSON} bytes of JSON")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # of UTF-8, of JSON, and of its depth
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_folder(path: Path, files: dict[str, bytes]) -> None:
    """A new folder with these files, which appears whole or not at all."""
    path = path.resolve()
    temporary = path.with_name(f".boft_ops-{uuid.uuid4().hex}")
    try:
        temporary.mkdir()
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
