"""python -m boft_ops [info | build | vendor DEST | merge BASE OUT --adapter FILE]: see --help."""

import argparse
import importlib.metadata
import os
import platform
import sys
from functools import partial
from pathlib import Path

import torch

from ._runtime import backend, native, paths, vendor
from ._runtime import build as build_tools
from ._runtime.namespace import NS, PACKAGE
from ._version import __version__


def info() -> str:
    """Describe this copy, and the backend of each operator on this machine."""
    facts = {
        "location": paths.HERE,
        "operators": f"torch.ops.{NS}",
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {_cuda()}",
        "triton": _triton(),
        "native": native.status,
        "library": native.library or "none",
    }
    if settings := [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("BOFT_OPS_")]:
        facts["settings"] = " ".join(settings)
    lines = [f"{PACKAGE} {__version__}", *(f"  {key:<10} {fact}" for key, fact in facts.items())]
    rows = [("op", "device", "served by", "why not by another")]
    for row in backend.report():
        others = "; ".join(f"{name}: {_brief(why)}" for name, why in row["others"].items())
        rows.append((row["op"], row["device"], row["serving"], others))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines.append("")
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[3]]).rstrip())
    return "\n".join(lines)


def _brief(why: str) -> str:
    # The full status of the library is printed above the table already.
    if native.library is not None and native.status in why:
        return "no kernels for it in the native library"
    return why.replace(native.status, native.status.partition(":")[0])


def _cuda() -> str:
    built = torch.version.cuda or torch.version.hip
    if built is None:
        return "built without CUDA"
    if not torch.cuda.is_available():
        return f"built for {built}, no device"
    return f"built for {built}, {torch.cuda.get_device_name()}"


def _triton() -> str:
    if not backend.has_triton():
        return "not installed"
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "installed (version unknown)"


def build(verbose: bool) -> str:
    """Compile the native library, unless this copy has one that loads; return a message.

    Raises:
        BuildError: the compiler fails, or the new library does not load.
    """
    if native.library is not None:
        return f"nothing to build: {native.library} is {native.status}"
    path = native.build(verbose)
    if not native.load():
        raise build_tools.BuildError(f"built {path}, but it is {native.status}")
    return f"built {path}: {native.status}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {PACKAGE}", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser(
        "info", help="show what is installed and which backend serves which op (default)"
    )
    make = commands.add_parser("build", help="compile the native library of this copy into a cache")
    make.add_argument("-v", "--verbose", action="store_true", help="show the compiler's commands")
    copy = commands.add_parser("vendor", help="copy this package into another code base")
    copy.add_argument("dest", metavar="DEST", type=Path, help="the copy, e.g. src/third_party/boft")
    copy.add_argument("--force", action="store_true", help="replace an earlier copy")
    copy.add_argument("--with-native", action="store_true", help="copy the compiled library too")
    merge = commands.add_parser("merge", help="merge an adapter into the files of a model")
    merge.add_argument("base", metavar="BASE", type=Path, help="a safetensors file, or a folder")
    merge.add_argument("out", metavar="OUT", type=Path, help="a new file or folder")
    merge.add_argument("--adapter", type=Path, required=True, help="as python -m ....convert reads")
    merge.add_argument("--prefix", default="lycoris", help="of LyCORIS' names, as for convert")
    args = parser.parse_args(argv)
    try:
        if args.command == "build":
            print(build(args.verbose))
        elif args.command == "merge":
            from .interop.merge_checkpoint import merge_checkpoint

            report = partial(print, flush=True)
            options = {"prefix": args.prefix, "report": report}
            merge_checkpoint(args.base, args.out, args.adapter, **options)
        elif args.command == "vendor":
            dest = vendor.vendor(args.dest, force=args.force, with_native=args.with_native)
            print(f"copied to {dest}")
            if not args.with_native:
                print("`python -m <its dotted name> build` compiles its native library")
        else:
            print(info(), flush=True)
    except BrokenPipeError:  # `| head` has closed the pipe: no second error at exit, either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, build_tools.BuildError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
