"""Reads an adapter checkpoint of any known format."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from . import native, peft_reader, trainers
from .checkpoint import Base, Checkpoint, Shapes, check, shapes_of
from .files import read_tensors

SOURCES = ("auto", "boft_ops", "peft", *trainers.TRAINERS)


def read_checkpoint(
    source: str | os.PathLike[str],
    *,
    source_format: str = "auto",
    base: Base | None = None,
    prefix: str | None = None,
) -> Checkpoint:
    """Read an adapter checkpoint into this package's convention.

    Args:
        source, source_format, base, prefix: as for ``interop.convert.convert``.

    Returns:
        The adapter: ``layers`` with ``skew``, ``scale`` and ``config``, and further tensors.

    Raises:
        FileNotFoundError, ValueError: as for ``convert``.
    """
    if source_format not in SOURCES:
        raise ValueError(f"source_format: expected one of {SOURCES}, got {source_format!r}")
    path = Path(source)
    shapes = {} if base is None else shapes_of(base)
    try:
        return check(_read(path, shapes, prefix, source_format), path)
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path, shapes: Shapes, prefix: str | None, source_format: str) -> Checkpoint:
    """Read a checkpoint with the reader of its format."""
    if path.is_dir():
        _check_format(path, source_format, {"peft"})
        return peft_reader.read(path, shapes)
    tensors, metadata = read_tensors(path)
    if native.is_checkpoint(metadata):
        _check_format(path, source_format, {"boft_ops"})
        return native.read(path, tensors, metadata, shapes)
    found = trainers.trainers_of(tensors, metadata)
    if not found:
        raise ValueError(
            f"{path}: expected a file of save_adapter, of BOFT or OFT by LyCORIS, OneTrainer or "
            f"sd-scripts, or PEFT's folder, got one of tensors {sorted(tensors)[:4]}"
        )
    _check_format(path, source_format, found)
    trainer = found[0] if source_format == "auto" else source_format
    return trainers.read(path, tensors, shapes, prefix, trainer)


def _check_format(path: Path, wanted: str, found: Collection[str]) -> None:
    if wanted not in ("auto", *found):
        raise ValueError(f"{path}: expected the format {wanted}, got that of {' or '.join(found)}")
