"""python -m boft_ops.convert IN OUT --to peft|boft_ops|lycoris: convert adapter checkpoints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ._runtime.namespace import PACKAGE
from .interop.convert import FORMATS, PREFIX, convert


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {PACKAGE}.convert", description=__doc__)
    parser.add_argument("source", metavar="IN", type=Path, help="PEFT's folder, or a file")
    parser.add_argument("destination", metavar="OUT", type=Path, help="a new folder or file")
    parser.add_argument("--to", choices=FORMATS, required=True, help="the format of OUT")
    parser.add_argument(
        "--base",
        type=Path,
        help="the pretrained model: a safetensors file, or a folder of them; only names and shapes "
        "are read. Conversions that need it say so",
    )
    parser.add_argument(
        "--prefix",
        default=PREFIX,
        help="the prefix of LyCORIS' names of layers, e.g. lora_unet or lora_te1; layers of other "
        "trainers' prefixes are left out (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        written = convert(
            args.source, args.destination, args.to, base=args.base, prefix=args.prefix
        )
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    print(
        f"{args.destination}: {len(written.layers)} layers, {len(written.others)} further tensors"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
