"""Build of csrc/cuda for the CPU, with emulated kernels, and registration of its operators.

The sources of the kernels are the ones that nvcc compiles; tests/cuda/emulation.h takes the place
of CUDA. The operators are registered as ``torch.ops.<namespace>.<op>`` and take CPU tensors.
``python tests/helpers/cuda_emulation.py FOLDER [CXXFLAGS...]`` builds into a folder with further
flags.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from boft_ops._runtime import build as build_tools
from boft_ops._runtime import paths

TESTS = Path(__file__).resolve().parents[1]
BUILDS = TESTS.parent / "build" / "emulated-by-digest"
LIB = "libboft_emulated.so"
# Without optimization, because the tests take longer to compile than to run: -O1 takes 1.5 to 2.8
# times as long to compile and 0.6 to 0.8 times as long to run.
FLAGS = ("-O0", "-g1", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-fno-strict-aliasing")


def build(
    csrc: Path,
    folder: Path,
    flags: tuple[str, ...] = FLAGS,
    reuse: Path | None = None,
    changed: str = "",
) -> Path:
    """Compile the sources of ``csrc`` into a library, and return its path.

    Args:
        csrc: folder of the sources.
        folder: folder of the library and the objects.
        flags: compiler flags.
        reuse: folder of an earlier build. If given, only files that include ``changed`` are
            compiled again.
        changed: name of the changed file.

    Raises:
        RuntimeError: the compiler failed.
    """
    torch = build_tools.find_torch()
    compiler = ["g++", "-std=c++17", "-fPIC", "-fno-gnu-unique", *flags]
    compiler += ["-DBOFT_EMULATED", "-DBOFT_OPS_CUDA", f"-I{csrc}", f"-I{TESTS / 'cuda'}"]
    compiler += ["-isystem", str(torch.root / "include")]
    compiler += ["-isystem", str(torch.root / "include" / "torch" / "csrc" / "api" / "include")]
    compiler += ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    sources = [
        *sorted((csrc / "cuda").glob("*.cu")),
        *sorted(csrc.glob("binding_cuda*.cpp")),
        TESTS / "cuda" / "binding.cpp",
    ]
    folder.mkdir(parents=True, exist_ok=True)

    def compile(source: Path) -> Path:
        name = f"{source.name}.o"
        if reuse is not None and changed not in (reuse / f"{name}.d").read_text():
            return reuse / name
        out = ["-MD", "-MF", str(folder / f"{name}.d"), "-o", str(folder / name)]
        # the time of the host is measured in the bindings, and they compile fast
        level = () if source.suffix == ".cu" else ("-O2",)
        _run([*compiler, *level, "-x", "c++", "-c", str(source), *out])
        return folder / name

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    part = folder / f"{LIB}.part"  # a build that is ended leaves no library
    link = ["-shared", "-o", str(part), *map(str, objects)]
    _run([*compiler, *link, f"-L{torch.root / 'lib'}", "-ltorch_cpu"])
    return part.replace(folder / LIB)


def build_once() -> Path:
    """Build the unchanged sources unless an earlier run of the tests has; returns the folder."""
    folder = BUILDS / _digest()
    BUILDS.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILDS / "lock"):
        if not (folder / LIB).exists():
            for old in BUILDS.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            build(paths.csrc(), folder)
    return folder


def _digest() -> str:
    """Digest of all that makes the library."""
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    everything = hashlib.sha256(version + repr(build_tools.find_torch()).encode())
    ours = [Path(__file__), *(TESTS / "cuda").glob("*.h"), TESTS / "cuda" / "binding.cpp"]
    for file in sorted([*ours, *filter(Path.is_file, paths.csrc().rglob("*"))]):
        everything.update(str(file).encode() + b"\0" + file.read_bytes())
    return everything.hexdigest()[:16]


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{run.stderr}")


def register(library: Path, namespace: str):
    """Put the operators of a library under a namespace; returns ``torch.ops.<namespace>``."""
    import torch

    from boft_ops._runtime import backend

    definitions = torch.library.Library(namespace, "DEF")
    for op in backend.ops().values():
        definitions.define(op.schema)
    lib = ctypes.CDLL(str(library))
    message = ctypes.create_string_buffer(2048)
    if lib.boft_emulated_register(namespace.encode(), message, len(message)) != 0:
        raise RuntimeError(message.value.decode())
    space = getattr(torch.ops, namespace)
    space._definitions = definitions  # torch drops operators whose definitions are freed
    return space


if __name__ == "__main__":
    print(build(TESTS.parent / "csrc", Path(sys.argv[1]), FLAGS + tuple(sys.argv[2:])))
