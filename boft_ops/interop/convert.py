"""Converts adapter checkpoints between libraries (docs/interop.md).

The adapter is all that is needed, unless its format leaves out something that the target format
needs. Then ``base``, the pretrained model, supplies it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from .._runtime.files import check_new
from .formats import lycoris, native, peft_writer, updates
from .formats.checkpoint import Base, Checkpoint
from .formats.reader import read_checkpoint
from .merge_checkpoint import merge_checkpoint

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
    check_new(destination)
    if to == "merged" and not isinstance(base, (str, os.PathLike)):
        raise ValueError(f"base: expected the files of the model for to='merged', got {base!r:.60}")
    checkpoint = read_checkpoint(source, source_format=source_format, base=base, prefix=prefix)
    if to == "merged":
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
