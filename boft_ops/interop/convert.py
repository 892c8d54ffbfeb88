"""Converts adapter checkpoints between libraries (docs/interop.md).

The adapter is all that is needed, unless its format leaves out something that the target format
needs. Then ``base``, the pretrained model, supplies it.
"""

from __future__ import annotations

import os
from pathlib import Path

from .formats import lycoris, native, peft_reader, peft_writer
from .formats.checkpoint import Base, Checkpoint, Shapes, check, shapes_of
from .formats.files import read_tensors

FORMATS = ("peft", "boft_ops", "lycoris")
PREFIX = "lycoris"  # LyCORIS' own prefix of layer names; trainers use others, such as lora_unet


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: str,
    *,
    base: Base | None = None,
    prefix: str = PREFIX,
) -> Checkpoint:
    """Write an adapter checkpoint in another format.

    The converted layers compute the same function up to rounding, or the conversion is refused.
    For example, no rotation of inputs (PEFT) is a rotation of outputs (LyCORIS).
    The constraints of PEFT's and LyCORIS' training (``coft``, ``alpha``) are applied to the
    parameters and not kept.

    Args:
        source: a PEFT folder (BOFT or OFT), a file of ``save_adapter``, or a LyCORIS file (BOFT or
            diag-oft). The weights are in safetensors, or in a pickle that
            ``torch.load(weights_only=True)`` accepts.
        destination: a folder for PEFT, else a file. It must not exist; it appears whole or not at
            all.
        to: "peft", "boft_ops" or "lycoris".
        base: the pretrained model, as a module, a safetensors file or a folder of them; only names
            and shapes are read. LyCORIS as a source needs it, because its names have lost their
            dots. Other conversions that need it say so in their error.
        prefix: the prefix of LyCORIS' names of layers. A trainer's file may hold several networks,
            such as lora_unet, lora_te1 and lora_te2: the one with this prefix is converted, and a
            warning counts the layers of the others.

    Returns:
        The ``Checkpoint`` that was written.

    Raises:
        FileNotFoundError: there is no source, no base, or no folder for the destination.
        FileExistsError: the destination exists.
        ValueError: the source is truncated, spoiled or of an unknown format, or the target format
            has no such adapter; the message names the tensor or option, and the reason.
    """
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {FORMATS}, got {to!r}")
    destination = Path(destination)
    if os.path.lexists(destination):
        raise FileExistsError(f"destination: expected a new path, got {str(destination)!r}")
    if not destination.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"destination: expected a path in a folder, got {str(destination)!r}"
        )
    checkpoint = read_checkpoint(source, base=base, prefix=prefix)
    if to == "peft":
        peft_writer.write(checkpoint, destination, base)
    elif to == "lycoris":
        lycoris.write(checkpoint, destination, prefix)
    else:
        native.write(checkpoint, destination)
    return checkpoint


def read_checkpoint(
    source: str | os.PathLike[str], *, base: Base | None = None, prefix: str = PREFIX
) -> Checkpoint:
    """Read an adapter checkpoint into this package's convention.

    Args:
        source, base, prefix: as for ``convert``.

    Returns:
        The adapter: ``layers`` with ``skew``, ``scale`` and ``config``, and further tensors.

    Raises:
        FileNotFoundError, ValueError: as for ``convert``.
    """
    path = Path(source)
    shapes = {} if base is None else shapes_of(base)
    try:
        return check(_read(path, shapes, prefix), path)
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path, shapes: Shapes, prefix: str) -> Checkpoint:
    """Read a checkpoint with the reader of its format."""
    if path.is_dir():
        return peft_reader.read(path, shapes)
    tensors, metadata = read_tensors(path)
    if native.is_checkpoint(metadata):
        return native.read(path, tensors, metadata, shapes)
    if lycoris.is_checkpoint(tensors):
        return lycoris.read(path, tensors, shapes, prefix)
    raise ValueError(
        f"{path}: expected a file of save_adapter, of LyCORIS' BOFT or diag-oft, or PEFT's folder, "
        f"got one of tensors {sorted(tensors)[:4]}"
    )
