"""Show, build, copy or tune this installation, convert and merge adapters, analyze butterflies."""

import argparse
import importlib.metadata
import os
import platform
import sys
from functools import partial
from pathlib import Path

import torch

from ._runtime import backend, command, gpu, native, paths, vendor
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
        "native": "; ".join(filter(None, (native.status, _native_fault()))),
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


def _native_fault() -> str | None:
    return gpu.native_fault(torch.cuda.current_device()) if torch.cuda.is_available() else None


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


def _info(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    print(info(), flush=True)
    return 0


def _build(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    print(build(args.verbose))
    return 0


def _vendor(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    dest = vendor.vendor(args.dest, force=args.force, with_native=args.with_native)
    print(f"copied to {dest}")
    if not args.with_native:
        print("`python -m <its dotted name> build` compiles its native library")
    return 0


def _merge(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .interop.merge_checkpoint import merge_checkpoint

    report = partial(print, flush=True)
    merge_checkpoint(args.base, args.out, args.adapter, prefix=args.prefix, report=report)
    return 0


def _add_merge(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "base",
        metavar="BASE",
        type=Path,
        help="the pretrained model: a safetensors file, or a folder of them",
    )
    add("out", metavar="OUT", type=Path, help="the new file or folder")
    add("--adapter", type=Path, required=True, help="a checkpoint that `convert` reads")
    add(
        "--prefix",
        help="the network of a trainer's file, by its prefix, as for convert",
    )


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", help="show the compiler's commands")


def _add_vendor(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dest", metavar="DEST", type=Path, help="the new folder, e.g. src/third_party/boft")
    add("--force", action="store_true", help="replace an earlier copy")
    add("--with-native", action="store_true", help="copy the compiled library too")


def _parser(prog: str) -> argparse.ArgumentParser:
    """One parser for all commands; ``run`` and ``parser`` of its result belong to the chosen one.

    The commands with a module of their own are `python -m boft_ops.<command>`, too.
    """
    from . import convert
    from .analysis import __main__ as analysis
    from .tune import __main__ as tune

    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.set_defaults(run=_info, parser=parser)
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, run, add_arguments, text in (
        (
            "info",
            _info,
            None,
            "show this copy, and the backend that runs each operator (default)",
        ),
        ("build", _build, _add_build, "compile the native library of this copy into a cache"),
        ("vendor", _vendor, _add_vendor, "copy this package into another code base"),
        ("convert", convert.run, convert.add_arguments, "convert an adapter checkpoint"),
        ("merge", _merge, _add_merge, "merge an adapter into the files of a model"),
        ("tune", tune.run, tune.add_arguments, "measure what is fastest on this machine"),
        ("analysis", analysis.run, analysis.add_arguments, "count and draw what a butterfly mixes"),
    ):
        chosen = commands.add_parser(name, help=text, description=text)
        chosen.set_defaults(run=run, parser=chosen)
        if add_arguments is not None:
            add_arguments(chosen)
    return parser


def main(argv: list[str] | None = None, *, prog: str = f"python -m {PACKAGE}") -> int:
    """Run the command line; return the exit status."""
    args = _parser(prog).parse_args(argv)
    return command.run(args.run, args, args.parser)


def console() -> int:
    """Run the command line as `boft-ops`, which installing the package provides."""
    return main(prog="boft-ops")


if __name__ == "__main__":
    sys.exit(main())
