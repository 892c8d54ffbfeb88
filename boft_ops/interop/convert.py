"""Checkpoints of one library as those of another (docs/interop.md).

Nothing but the adapter is needed, except where a format leaves something out that another one
needs: then ``base``, the pretrained model, must say it.
"""

from __future__ import annotations

import os
from pathlib import Path

from .formats import lycoris, native, peft_reader, peft_writer
from .formats.adapter import Adapter, Base, Shapes, check, shapes_of
from .formats.files import read_tensors

FORMATS = ("peft", "boft_ops", "lycoris")
PREFIX = "lycoris"  # of LyCORIS' own names of layers; trainers have others, such as lora_unet


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    to: str,
    *,
    base: Base | None = None,
    prefix: str = PREFIX,
) -> Adapter:
    """Write an adapter checkpoint in another format.

    The layers compute the same function up to rounding, or the conversion is refused: rotations of
    inputs (PEFT) are none of outputs (LyCORIS), for example. What constrains PEFT's or LyCORIS'
    training (``coft``, ``alpha``) is applied to the parameters, not kept.

    Args:
        source: a PEFT folder (BOFT or OFT), a file of ``save_adapter``, or a LyCORIS file (BOFT or
            diag-oft). Weights in safetensors, or in a pickle that ``weights_only=True`` takes.
        destination: a folder for PEFT, else a file. It must not exist; it appears whole or not at
            all.
        to: "peft", "boft_ops" or "lycoris".
        base: the pretrained model, as a module, a safetensors file or a folder of them, of which
            names and shapes alone are read. LyCORIS as a source needs it (its names have lost
            their dots), and so do single conversions that say so.
        prefix: what LyCORIS' names of layers begin with.

    Returns:
        What was written, see ``Adapter``.

    Raises:
        FileNotFoundError: no source, no base, or no folder for the destination.
        FileExistsError: the destination exists.
        ValueError: the source is truncated, spoiled or of another kind, or the target format has
            no such adapter; the message says which tensor or option, and why.
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
    adapter = read_checkpoint(source, base=base, prefix=prefix)
    if to == "peft":
        peft_writer.write(adapter, destination, base)
    elif to == "lycoris":
        lycoris.write(adapter, destination, prefix)
    else:
        native.write(adapter, destination)
    return adapter


def read_checkpoint(
    source: str | os.PathLike, *, base: Base | None = None, prefix: str = PREFIX
) -> Adapter:
    """The adapter that a checkpoint holds, in this package's terms; arguments as for ``convert``.

    Raises:
        FileNotFoundError, ValueError: as ``convert``.
    """
    path = Path(source)
    shapes = {} if base is None else shapes_of(base)
    try:
        return check(_read(path, shapes, prefix), path)
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path, shapes: Shapes, prefix: str) -> Adapter:
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
