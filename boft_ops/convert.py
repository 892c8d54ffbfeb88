"""python -m boft_ops.convert IN OUT --to FORMAT: convert an adapter checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ._runtime import command
from .interop.convert import TARGETS, convert
from .interop.formats.reader import SOURCES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to a parser."""
    add = parser.add_argument
    add("source", metavar="IN", type=Path, help="a PEFT folder, or a file")
    add("destination", metavar="OUT", type=Path, help="a new folder (peft, lora, merged) or file")
    add(
        "--from",
        dest="source_format",
        choices=SOURCES,
        default="auto",
        help="the format of IN (default: %(default)s)",
    )
    add(
        "--to",
        choices=TARGETS,
        required=True,
        help="the format of OUT. diff is the change of each weight, lora a low-rank approximation, "
        "merged the whole model with the adapter in it",
    )
    add(
        "--base",
        type=Path,
        help="the pretrained model: a safetensors file, or a folder of them. Its names and shapes "
        "are read; diff, lora and merged read the weights too. An error says if it is missing",
    )
    add(
        "--prefix",
        help="the network to convert from a trainer's file, by its prefix, e.g. lora_unet or "
        "lora_te1 (default: the only network of the file)",
    )
    add("--rank", type=int, help="the rank for --to lora")
    add(
        "--max-error",
        type=float,
        metavar="E",
        help="--to lora writes nothing if the relative error of a layer is larger than this",
    )


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Convert as the arguments of ``parser`` say; return the exit status."""
    written = convert(
        args.source,
        args.destination,
        args.to,
        source_format=args.source_format,
        base=args.base,
        prefix=args.prefix,
        rank=args.rank,
        max_error=args.max_error,
    )
    for name, error in written.errors.items():
        print(f"{name}: relative error {error:.4f}")
    print(
        f"{args.destination}: {len(written.layers)} layers, {len(written.others)} further tensors"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return command.main("convert", __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
