"""Build of the native library, for setup.py and for `python -m boft_ops build`.

This file imports only the standard library and has no relative import, because setup.py loads it by
its path, before the package exists and where torch may not be importable. The build locates torch
without importing it, because it needs nothing of torch but its headers and libraries. The native
library uses only torch's stable C ABI, so one binary serves every torch >= 2.10, with and without
CUDA, and every Python.
"""

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# The library is not an extension module, so its name must not have an importable suffix.
LIB = "libboft_native.so"
INFO = "_build_info.json"  # beside LIB: how the library was built, or why there is none
MIN_TORCH = (2, 10)  # the first version whose stable ABI has parallel_for
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"
ARCH = r"(\d+)\.(\d+)([af]?)(\+PTX)?"  # one of them: major, minor, suffix, PTX too


class BuildError(RuntimeError):
    """The library cannot be built, or its build failed. The message is meant for the user."""


class SettingError(BuildError):
    """An environment variable has a value that cannot be honored.

    This error always ends the build; it never leads to a package without the library.
    """


class Torch(NamedTuple):
    """An installed torch: its folder, its version, and its CUDA version or None."""

    root: Path
    version: str
    cuda: str | None


class Plan(NamedTuple):
    """The compiler of the CUDA kernels and the devices that are built for.

    Attributes:
        nvcc: path of nvcc, or None to compile only the CPU kernels.
        why: the devices, and the reason if CUDA is left out.
    """

    nvcc: str | None
    why: str


def flag(name: str) -> bool:
    """Read an environment variable that is on or off; unset means off.

    Raises:
        SettingError: the value is neither on nor off.
    """
    value = os.environ.get(name, "").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    raise SettingError(f"{name}: expected 0 or 1, got {os.environ[name]!r}")


def words(name: str) -> list[str]:
    """Split an environment variable that holds a part of a command line.

    Raises:
        SettingError: a quotation mark is not closed.
    """
    try:
        return shlex.split(os.environ.get(name, ""))
    except ValueError:
        raise SettingError(f"{name}: expected shell words, got {os.environ[name]!r}") from None


def wanted_cuda() -> str:
    """Read BOFT_OPS_CUDA: "auto", "0" or "1".

    Raises:
        SettingError: it has another value.
    """
    want = os.environ.get("BOFT_OPS_CUDA", "").strip().lower() or "auto"
    if want not in ("auto", "0", "1"):
        got = os.environ["BOFT_OPS_CUDA"]
        raise SettingError(f"BOFT_OPS_CUDA: expected auto, 0 or 1, got {got!r}")
    return want


def check_settings() -> None:
    """Raise SettingError if one of the package's own variables has a value that is not understood.

    Variables are checked even if the present build does not need them.
    """
    for name in ("BOFT_OPS_SKIP_EXT", "BOFT_OPS_FORCE_EXT", "BOFT_OPS_DEBUG"):
        flag(name)
    wanted_cuda()


def find_torch(more: list[str] | None = None) -> Torch | None:
    """Locate the torch to build against, without importing it.

    Args:
        more: folders to search after sys.path.
    """
    spec = importlib.util.find_spec("torch")
    roots = [Path(p) for p in (spec and spec.submodule_search_locations) or ()]
    for root in [*roots, *(Path(p) / "torch" for p in more or ())]:
        try:
            text = (root / "version.py").read_text()
        except OSError:
            continue
        version = re.search(r"^__version__ *= *['\"]([^'\"]+)", text, re.M)
        cuda = re.search(r"^cuda\b[^=\n]*= *['\"]([^'\"]+)", text, re.M)
        if version and (root / "include").is_dir():
            return Torch(root, version[1], cuda and cuda[1])
    return None


def compiler() -> list[str] | None:
    """Find the C++ compiler, as a command prefix: $CXX, else the first of c++, g++, clang++."""
    for command in [words("CXX")] if os.environ.get("CXX") else [["c++"], ["g++"], ["clang++"]]:
        if command and shutil.which(command[0]):
            return command
    return None


def find_nvcc() -> str | None:
    """Find nvcc in CUDA_HOME, CUDA_PATH or PATH."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def obstacle(csrc: Path | None, torch: Torch | None) -> str | None:
    """Return the reason why the library cannot be built here, without a full stop, or None."""
    if sys.platform != "linux":
        return f"the native library is built on Linux only (this is {sys.platform})"
    if csrc is None or not (csrc / "binding.cpp").is_file():
        return "this copy has no C++ sources"
    if compiler() is None:
        asked = os.environ.get("CXX")
        return f"no C++ compiler: CXX={asked} not found" if asked else "no C++ compiler (c++, g++)"
    if torch is None:
        return "torch is not visible to the build (install it, then use --no-build-isolation)"
    if tuple(int(n) for n in re.findall(r"\d+", torch.version)[:2]) < MIN_TORCH:
        return f"torch {torch.version} is older than 2.10, the first with the stable ABI used here"
    return None


def sources(csrc: Path, cuda: bool) -> list[Path]:
    """List the source files, with those of the CUDA kernels if ``cuda``.

    The kernels come first and the bindings last: a file that takes long must not be the last one
    that is compiled, while the other cores have nothing to do.
    """
    return [
        *(sorted((csrc / "cuda").glob("*.cu")) if cuda else []),
        *sorted((csrc / "cpu").glob("*.cpp")),
        *sorted(csrc.glob("*.cpp")),
    ]


def source_hash(csrc: Path) -> str:
    """Compute a hash of the sources. A library that was built from other sources is not loaded."""
    digest = hashlib.sha256()
    for file in sorted(csrc.rglob("*")):
        if file.suffix in (".h", ".cpp", ".cu", ".cuh"):
            digest.update(file.relative_to(csrc).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def plan(csrc: Path, torch: Torch) -> Plan:
    """Decide if the CUDA kernels are compiled too. Without CUDA sources nvcc is not needed.

    Raises:
        SettingError: BOFT_OPS_CUDA=1, but there is no nvcc.
    """
    want = wanted_cuda()
    if not any((csrc / "cuda").glob("*.cu")):
        return Plan(None, "CPU (there are no CUDA sources)")
    if want == "0":
        return Plan(None, "CPU (BOFT_OPS_CUDA=0)")
    if want == "auto" and torch.cuda is None:
        return Plan(None, "CPU (a torch without CUDA; BOFT_OPS_CUDA=1 compiles for it anyway)")
    nvcc = find_nvcc()
    if nvcc is None and want == "1":
        raise SettingError("BOFT_OPS_CUDA=1, but there is no nvcc on PATH or in CUDA_HOME")
    return Plan(nvcc, "CPU and CUDA") if nvcc else Plan(None, "CPU (no nvcc)")


def write_info(folder: Path, **facts) -> None:
    """Write facts about a build to INFO."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INFO).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_info(folder: Path) -> dict:
    """Read the facts that ``write_info`` wrote; an unreadable file has none."""
    try:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def note_absence(folder: Path, why: str) -> None:
    """Record why there is no library, and remove the library of an earlier build.

    The earlier library would otherwise still be loaded.
    """
    (folder / LIB).unlink(missing_ok=True)
    write_info(folder, native=False, why=why)


def wanted_archs(nvcc: str) -> str:
    """Read TORCH_CUDA_ARCH_LIST. "native" becomes the architectures of the GPUs that nvcc finds.

    Raises:
        SettingError: it is "native", and nvcc finds no GPU.
    """
    archs = (os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS).strip()
    if archs != "native":
        return archs
    command = [nvcc, "-arch=native", "--dryrun", "-x", "cu", "-c", os.devnull]
    said = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    found = sorted({(int(a), int(b)) for a, b in re.findall(r"ptxas .*?sm_(\d+)(\d)", said.stdout)})
    if not found or "Cannot find valid GPU" in said.stdout:  # nvcc then takes its oldest one
        raise SettingError("TORCH_CUDA_ARCH_LIST=native: nvcc finds no GPU on this machine")
    return ";".join(f"{major}.{minor}" for major, minor in found)


def cuda_of(nvcc: str) -> str | None:
    """Return the version of CUDA that an nvcc belongs to, such as "13.0"; None if it says none."""
    said = subprocess.run([nvcc, "--version"], text=True, capture_output=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found and found[1]


def gencode(archs: str) -> list[str]:
    """Translate architectures such as "8.0;9.0a;10.0+PTX" to options of nvcc.

    Raises:
        SettingError: an architecture is not understood.
    """
    options = []
    for arch in re.split(r"[;,\s]+", archs.strip()):
        match = re.fullmatch(ARCH, arch)
        if not match:
            raise SettingError(f'TORCH_CUDA_ARCH_LIST: expected e.g. "8.0;9.0+PTX", got {archs!r}')
        cc = match[1] + match[2] + match[3]
        options.append(f"-gencode=arch=compute_{cc},code=sm_{cc}")
        if match[4]:
            options.append(f"-gencode=arch=compute_{cc},code=compute_{cc}")
    return options


def _steps(csrc: Path, torch: Torch, nvcc: str | None, archs: str | None, work: Path, out: Path):
    """List the commands of a build as (command, inputs, output).

    There is one command for each source file; the last one links the library.
    """
    cxx = compiler()
    debug = flag("BOFT_OPS_DEBUG")
    common = ["-O0", "-g", "-UNDEBUG"] if debug else ["-O3", "-DNDEBUG"]
    host = [*common, "-fPIC", "-fvisibility=hidden"]
    # Error messages must not contain a folder of the build machine.
    host.append(f"-ffile-prefix-map={csrc}=csrc")
    # Without this flag of GCC, two copies of the library in one process share static variables.
    if "clang" not in os.path.basename(os.path.realpath(shutil.which(cxx[0]))):
        host.append("-fno-gnu-unique")
    host += ["-std=c++17", "-Wall", f"-I{csrc}"]
    host += ["-isystem", str(torch.root / "include")]
    host += ["-isystem", str(torch.root / "include" / "torch" / "csrc" / "api" / "include")]
    host += ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    host += words("CXXFLAGS")
    ldflags = words("LDFLAGS")
    device = [*common, "-std=c++17", f"-I{csrc}", "--expt-relaxed-constexpr"]
    device += ["--threads", "2", "-ccbin", cxx[0], "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    device += ["-Xcompiler", f"-ffile-prefix-map={csrc}=csrc"]
    device += gencode(archs) if archs else []

    steps, objects = [], []
    for source in sources(csrc, bool(nvcc)):
        obj = work / source.relative_to(csrc).with_suffix(source.suffix + ".o")
        start = [nvcc, *device] if source.suffix == ".cu" else [*cxx, *host]
        if nvcc and source.parent == csrc:  # the bindings alone differ, not the CPU kernels
            start.append("-DBOFT_OPS_CUDA")
        command = [*start, "-MD", "-MF", f"{obj}.d", "-c", str(source), "-o", str(obj)]
        steps.append((command, [source], obj))
        objects.append(obj)
    # The library uses only torch's stable C ABI and links the CUDA runtime statically, so it loads
    # beside any torch. nvcc finds its own runtime and links it in.
    torch_lib = [f"-L{torch.root / 'lib'}", "-ltorch_cpu"]
    if nvcc:
        link = [nvcc, "-shared", "-cudart", "static", "-ccbin", cxx[0]]
        checks = ["-Xlinker", "--no-undefined", "-Xlinker", "--exclude-libs=ALL"]
    else:
        link = [*cxx, "-shared"]
        checks = ["-Wl,--no-undefined", "-Wl,--exclude-libs=ALL"]
    command = [*link, "-o", str(out), *map(str, objects), *torch_lib, *checks, *ldflags]
    return [*steps, (command, objects, out)]


def find_ninja() -> str | None:
    """Find ninja beside the running Python or on PATH."""
    # The bin folder of a virtual environment is not on PATH if its Python is called by path.
    return shutil.which("ninja", path=os.path.dirname(sys.executable)) or shutil.which("ninja")


def _run(command: list[str], verbose: bool) -> None:
    """Run a command; raise BuildError with the first error message if it fails."""
    if verbose:
        print(shlex.join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if verbose or done.returncode:
        print(done.stdout, end="", file=sys.stderr, flush=True)
    if done.returncode:
        error = re.search(r"^.*(?:error|undefined reference).*$", done.stdout, re.M | re.I)
        raise BuildError(f"the compiler failed: {error[0].strip() if error else command[0]}")


def _ninja_file(steps) -> str:
    """Write the steps of a build as the text of a build.ninja file."""

    def path(p: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(p))

    lines = ["rule compile", "  command = $cmd", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $cmd"]
    for number, (command, inputs, output) in enumerate(steps):
        rule = "link" if number == len(steps) - 1 else "compile"
        lines.append(f"build {path(output)}: {rule} {' '.join(map(path, inputs))}")
        lines.append("  cmd = " + shlex.join(command).replace("$", "$$"))
    return "\n".join(lines) + "\n"


def compile_library(csrc: Path, torch: Torch, work: Path, out: Path, verbose: bool = False) -> Plan:
    """Compile the sources into a library, and write INFO beside it.

    Args:
        csrc: folder of the sources.
        torch: the torch to build against.
        work: folder of the object files, which speed up the next build.
        out: path of the library.
        verbose: print the commands and their output. The default is False.

    Returns:
        The plan that was followed.

    Raises:
        BuildError: the compiler failed.
        SettingError: an environment variable has a value that is not understood.
    """
    chosen = plan(csrc, torch)
    csrc, work, out = csrc.resolve(), work.resolve(), out.resolve()
    # The hash is taken before the compiler reads the sources, so that an edit during the build
    # makes the library stale.
    built_from = source_hash(csrc)
    archs = wanted_archs(chosen.nvcc) if chosen.nvcc else None
    steps = _steps(csrc, torch, chosen.nvcc, archs, work, out)
    for _, _, output in steps:
        output.parent.mkdir(parents=True, exist_ok=True)
    (out.parent / INFO).unlink(missing_ok=True)  # it would describe an earlier library
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not (jobs.isdecimal() and int(jobs)):
        raise SettingError(f"MAX_JOBS: expected a positive number, got {jobs!r}")
    if ninja := find_ninja():
        (work / "build.ninja").write_text(_ninja_file(steps))
        limit = ["-j", jobs] if jobs else []
        _run([ninja, "-C", str(work), *limit, *(["-v"] if verbose else [])], verbose)
    else:
        with ThreadPoolExecutor(int(jobs or os.cpu_count() or 1)) as pool:
            list(pool.map(lambda step: _run(step[0], verbose), steps[:-1]))
        _run(steps[-1][0], verbose)
    write_info(
        out.parent,
        native=True,
        source_hash=built_from,
        devices=chosen.why,
        archs=archs,
        cuda=cuda_of(chosen.nvcc) if chosen.nvcc else None,
        debug=flag("BOFT_OPS_DEBUG"),
        torch=torch.version,
    )
    return chosen
