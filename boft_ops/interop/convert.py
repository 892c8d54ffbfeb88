"""Converts adapter checkpoints between libraries (docs/interop.md).

The adapter is all that is needed, unless its format leaves out something that the target format
needs. Then ``base``, the pretrained model, supplies it.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from .formats import lycoris, native, peft_reader, peft_writer, trainers, updates
from .formats.checkpoint import Base, Checkpoint, Shapes, check, shapes_of
from .formats.files import read_tensors

SOURCES = ("auto", "boft_ops", "peft", *trainers.TRAINERS)
TARGETS = ("boft_ops", "peft", "lycoris", "diff", "lora", "merged")


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: str,
    *,
    source_format: str = "auto",
    base: Base | None = None,
    prefix: str | None = None,
    rank: int | None = None,
    max_error: float | None = None,
) -> Checkpoint:
    """Write an adapter checkpoint in another format.

    The converted layers compute the same function up to rounding, or the conversion is refused.
    For example, no rotation of inputs (PEFT) is a rotation of outputs (LyCORIS).
    "lora" alone approximates, and says by how much.
    The constraints of training (``coft``, ``alpha``) are applied to the parameters and not kept.

    Args:
        source: a PEFT folder (BOFT or OFT), a file of ``save_adapter``, or a file of LyCORIS (BOFT
            or diag-oft), OneTrainer (OFT) or sd-scripts (oft, oft_v2, boft). The weights are in
            safetensors, or in a pickle that ``torch.load(weights_only=True)`` accepts.
        destination: a folder for "peft" and "lora", else a file. It must not exist; it appears
            whole or not at all.
        to: "boft_ops", "peft", "lycoris", "diff", "lora" or "merged". "diff" is the update of each
            weight in float32, which ComfyUI and the webui of A1111 add to it. "lora" is a PEFT
            folder with the best approximation of each update by a product of rank ``rank``.
            "merged" is the pretrained model with the adapter in it, see ``merge_checkpoint``.
        source_format: "auto", or the one that the source must have: "boft_ops", "peft", "lycoris",
            "onetrainer" or "sd-scripts".
        base: the pretrained model, as a module, a safetensors file or a folder of them. Names and
            shapes are read, for "diff" and "lora" the adapted weights, too; "merged" copies the
            files, so that they have to be files. Trainers' files need
            it, because their names have lost their dots. Other conversions that need it say so in
            their error.
        prefix: the prefix of the names of layers in a trainer's file, as lora_unet or lora_te1. If
            the source holds several networks, it chooses one, and a warning counts the layers of
            the others. None reads the only network; it writes the names of the source, or the
            prefix lycoris ("lycoris") or lora_unet ("diff") if the source has other names.
        rank: of "lora"; required there.
        max_error: the largest relative error (Frobenius norm) that a layer of "lora" may have;
            required there. The update of a rotation has no small rank.

    Returns:
        The ``Checkpoint`` that was written; of "lora" with ``errors``.

    Raises:
        FileNotFoundError: there is no source, no base, or no folder for the destination.
        FileExistsError: the destination exists.
        TypeError: ``rank`` is no integer, or ``max_error`` no number.
        ValueError: the source is truncated, spoiled or of an unknown format, the target format has
            no such adapter, or an approximation exceeds ``max_error``; the message names the
            tensor or option, and the reason.
    """
    if to not in TARGETS:
        raise ValueError(f"to: expected one of {TARGETS}, got {to!r}")
    updates.check_options(to, base, rank, max_error)
    destination = Path(destination)
    if os.path.lexists(destination):
        raise FileExistsError(f"destination: expected a new path, got {str(destination)!r}")
    if not destination.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"destination: expected a path in a folder, got {str(destination)!r}"
        )
    if to == "merged" and not isinstance(base, (str, os.PathLike)):
        raise ValueError(f"base: expected the files of the model for to='merged', got {base!r:.60}")
    checkpoint = read_checkpoint(source, source_format=source_format, base=base, prefix=prefix)
    if to == "merged":
        from .merge_checkpoint import merge_checkpoint  # it reads checkpoints by this module

        merge_checkpoint(base, destination, source, prefix=prefix)
    elif to == "peft":
        peft_writer.write(checkpoint, destination, base)
    elif to == "lycoris":
        lycoris.write(checkpoint, destination, prefix)
    elif to == "diff":
        updates.write_diff(checkpoint, destination, base, prefix)
    elif to == "lora":
        tensors, errors = updates.low_rank(checkpoint, base, rank, max_error)
        peft_writer.write_lora(checkpoint, destination, base, tensors, rank)
        checkpoint = replace(checkpoint, errors=errors)
    else:
        native.write(checkpoint, destination)
    return checkpoint


def read_checkpoint(
    source: str | os.PathLike[str],
    *,
    source_format: str = "auto",
    base: Base | None = None,
    prefix: str | None = None,
) -> Checkpoint:
    """Read an adapter checkpoint into this package's convention.

    Args:
        source, source_format, base, prefix: as for ``convert``.

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
