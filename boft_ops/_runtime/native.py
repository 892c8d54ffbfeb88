"""The native library: find it, load it, and register its kernels under this package's namespace.

The library is not a Python extension. It is opened with ctypes, and it registers its kernels under
the namespace that it is given. A copy of the package without a usable library still works, with
Triton and PyTorch. `status` describes the state of the library in one sentence.
"""

import ctypes
import os
import platform
import stat
import struct
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from . import build as build_tools
from . import internals, paths
from .namespace import NS, PACKAGE

# The library registers its CUDA kernels apart from the operators, which choose among backends.
CUDA_NS = f"{NS}_cuda"
status: str = "not looked for yet"
library: Path | None = None
isa: str | None = None  # the instruction set of its CPU kernels
ISAS = ("baseline", "avx2", "avx512")  # the names in csrc/cpu/isa.cpp
_lib: ctypes.CDLL | None = None
_untold = False  # True until the absence of the library is told, where that is no one's choice
_kernels: dict[str, frozenset[str]] = {}


def kernels(device: str) -> frozenset[str]:
    """Names of the operators for which the loaded library has a kernel on "cpu" or "cuda"."""
    return _kernels.get(device, frozenset())


def archs() -> str | None:
    """Architectures of GPUs that the CUDA kernels of the library were compiled for.

    Returns:
        A list as TORCH_CUDA_ARCH_LIST has it; None without such kernels, or without a record.
    """
    return _recorded("archs")


def cuda_version() -> str | None:
    """Version of CUDA, such as "13.0", whose runtime is in the library, or None as for archs."""
    return _recorded("cuda")


def _recorded(fact: str) -> str | None:
    known = build_tools.read_info(library.parent).get(fact) if kernels("cuda") else None
    return known if isinstance(known, str) else None


def load() -> bool:
    """Open the library if one was built from the present sources; never compile or print.

    A library that exists but cannot be used causes a RuntimeWarning. An absent library causes none
    here: see ``tell_absence``.

    Returns:
        True if a library is loaded.

    Raises:
        ValueError: BOFT_OPS_CPU_ISA is not an instruction set, or this machine lacks it.
    """
    global status, library, isa, _lib, _kernels, _untold
    namespace = getattr(torch.ops, NS)
    # The state is kept on torch's own object. If this package is imported a second time in one
    # process, its kernels are registered already, and registering them again would be an error.
    state = vars(namespace).get("_native_library")
    if state is None:
        wanted = _wanted_isa()
        faults = []
        for path in _candidates(faults):
            try:
                state = _open(path, wanted)
            except (OSError, AttributeError, RuntimeError) as error:
                faults.append(f"broken: {path}: {error}")
                continue
            namespace._native_library = state
            break
        else:
            status = "; ".join(faults) or _absence()
            _untold = not faults and sys.platform == "linux"
            if faults:
                message = f"{PACKAGE}: the native library is {status}; running without it"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            return False
    _lib, library, isa, _kernels = state
    names = ", ".join(f"{len(ops)} on {device}" for device, ops in _kernels.items() if ops)
    names += f" for {compiled}" if (compiled := archs()) else ""
    debug = ", debug build" if build_tools.read_info(library.parent).get("debug") else ""
    status = f"loaded ({isa}; kernels: {names or 'none'}{debug})"
    return True


@internals.constant_in_graphs
def tell_absence() -> None:
    """Warn that an operator runs without its C++ kernel, once, and only if that was not chosen."""
    global _untold
    if not _untold:
        return
    _untold = False
    reason = build_tools.read_info(paths.HERE).get("why") or ""
    if not (reason.startswith("BOFT_OPS_SKIP_EXT") or build_tools.flag("BOFT_OPS_SKIP_EXT")):
        message = (
            f"{PACKAGE}: operators run as plain PyTorch on this CPU, without their C++ kernels: "
            f"the native library is {status}"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _wanted_isa() -> str | None:
    """Read BOFT_OPS_CPU_ISA; None if it is not set.

    Raises:
        ValueError: it is not an instruction set.
    """
    wanted = os.environ.get("BOFT_OPS_CPU_ISA") or None
    if wanted not in (None, *ISAS):
        raise ValueError(f"BOFT_OPS_CPU_ISA: expected one of {ISAS}, got {wanted!r}")
    return wanted


def build(verbose: bool = False) -> Path:
    """Compile the library of this copy into the cache, where load() finds it.

    Args:
        verbose: print the commands and their output. The default is False.

    Returns:
        The path of the library.

    Raises:
        BuildError: the library cannot be built here, or the compiler failed.
        SettingError: an environment variable has a value that is not understood.
    """
    build_tools.check_settings()
    source = paths.csrc()
    target = build_tools.find_torch([str(Path(torch.__file__).parent.parent)])
    if why := build_tools.obstacle(source, target):
        raise build_tools.BuildError(why)
    with_cuda = build_tools.plan(source, target).nvcc is not None
    folder = _cached(build_tools.source_hash(source), with_cuda).parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The library is built in a temporary folder and then moved. No process can then open half a
    # library, and an interrupted build leaves nothing that blocks the next one.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".build-") as work:
        out = Path(work) / "out"
        build_tools.compile_library(source, target, Path(work), out / build_tools.LIB, verbose)
        folder.mkdir(exist_ok=True)
        for path in (folder, out / build_tools.LIB):  # a usual umask lets the group write
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o022)
        for name in (build_tools.INFO, build_tools.LIB):
            os.replace(out / name, folder / name)
    return folder / build_tools.LIB


def cache_folder() -> Path:
    """Return the folder of compiled libraries and tuned choices, which need not exist yet.

    Raises:
        ValueError: BOFT_OPS_CACHE is set to a path that cannot be a folder.
        RuntimeError: there is no home folder, or its path is relative.
    """
    if chosen := os.environ.get("BOFT_OPS_CACHE"):
        folder = Path(os.path.expanduser(chosen))  # keeps the ~ of an unknown user
        if str(folder).startswith("~") or not paths.nearest(folder).is_dir():
            raise ValueError(f"BOFT_OPS_CACHE: expected a folder, got {chosen!r}")
        return folder
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and ignored. Libraries are loaded from here,
    # and must not come from whatever folder the process was started in.
    folder = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    if not folder.is_absolute():
        raise RuntimeError(f"HOME: expected an absolute path, got {os.environ.get('HOME')!r}")
    return folder / "boft_ops"


def _cached(built_from: str, cuda: bool) -> Path:
    """Path of the cached library for a hash of the sources, with or without CUDA kernels."""
    # The path contains no namespace: one library serves every copy that has the same sources.
    folder = f"{built_from}-{platform.machine()}-{'cuda' if cuda else 'cpu'}"
    return cache_folder() / folder / build_tools.LIB


def _candidates(faults: list[str]):
    """Yield the libraries to try, the package's own first.

    A library that was built from other sources, or that another user could have written, is not
    yielded; its description goes into ``faults``.
    """
    source = paths.csrc()
    built_from = source and build_tools.source_hash(source)
    own = paths.HERE / build_tools.LIB
    if own.is_file():
        if source is None or build_tools.read_info(paths.HERE).get("source_hash") == built_from:
            yield own
        else:
            faults.append(f"stale: {own} was built from other sources than {source} ({_remedy()})")
    for cuda in (True, False) if source else ():
        try:
            path = _cached(built_from, cuda)
            if not path.is_file():
                continue
            if why := _suspicion(path):
                faults.append(f"not trusted: {path}: {why}")
            else:
                yield path
        except (OSError, RuntimeError):  # the cache is unreadable, or there is no home folder
            continue


def _suspicion(library: Path) -> str | None:
    """Reason why code in the cache may be another user's, or None: loading it is running it."""
    for path in (library, library.parent):
        state = path.stat()
        if state.st_uid not in (0, os.geteuid()):
            return f"{path} belongs to another user, of number {state.st_uid}"
        if state.st_mode & 0o022:
            return f"other users may write to {path} (chmod go-w)"
    return None


def _remedy() -> str:
    """Advice on how to get a library that fits the sources."""
    return f"`python -m {PACKAGE} build`, or install again"


def _absence() -> str:
    """Reason why there is no library, and the way to get one."""
    if sys.platform != "linux":
        return "absent: it is built on Linux only"
    why = build_tools.read_info(paths.HERE).get("why")
    if paths.csrc() is None:
        return f"absent: {why or 'this copy has no C++ sources'}"
    why = why or "this copy was never built"
    return f"absent: {why}; `python -m {PACKAGE} build` compiles it"


def _check_whole(path: Path) -> None:
    """Raise OSError for a file that a full disk or an interrupted copy has cut short.

    The loader would map such a file, and the process would die of SIGBUS. A linker puts the section
    headers last, so a file that contains all of them is complete.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:4] != b"\x7fELF":
        raise OSError("not a shared library")
    (start,) = struct.unpack_from("=Q", head, 40)
    size, number = struct.unpack_from("=HH", head, 58)
    if path.stat().st_size < start + size * number:
        raise OSError("the file is cut short")


def _open(
    path: Path, wanted_isa: str | None
) -> tuple[ctypes.CDLL, Path, str, dict[str, frozenset[str]]]:
    """Open a library and register its kernels.

    Returns:
        The library, its path, its instruction set, and the names of its kernels by device.
    """
    _check_whole(path)
    lib = ctypes.CDLL(str(path))
    lib.boft_ops_isa.restype = ctypes.c_char_p
    lib.boft_ops_kernels.restype = ctypes.c_char_p
    lib.boft_ops_kernels.argtypes = [ctypes.c_char_p]
    lib.boft_ops_register.argtypes = [*[ctypes.c_char_p] * 3, ctypes.c_int]
    loaded_isa = lib.boft_ops_isa().decode()  # the wanted one if this machine has it, else its best
    if wanted_isa not in (None, loaded_isa):
        raise ValueError(
            f"BOFT_OPS_CPU_ISA: expected an instruction set of this machine, up to {loaded_isa}, "
            f"got {wanted_isa!r}"
        )
    names = {}
    for device in ("cpu",) if torch.version.hip else ("cpu", "cuda"):  # torch calls AMD's GPUs cuda
        listed = (lib.boft_ops_kernels(device.encode()) or b"").decode()
        names[device] = frozenset(filter(None, listed.split(",")))
    message = ctypes.create_string_buffer(2048)
    for device, namespace in (("cpu", NS), ("cuda", CUDA_NS)):
        call = namespace.encode(), device.encode(), message, len(message)
        if names.get(device) and lib.boft_ops_register(*call) != 0:
            raise RuntimeError(message.value.decode(errors="replace"))
    return lib, path, loaded_isa, names
