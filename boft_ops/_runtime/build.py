"""How the native library is made: one list of sources, flags and steps for setup.py and `build`.

Standard library only and no relative import: setup.py loads this file by its path, before the
package exists and where torch cannot be imported. torch is only looked for, because all that the
build needs of it is two folders. The library uses nothing but torch's stable C ABI, so one binary
serves every torch >= 2.10, with and without CUDA, and every Python.
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

# An importable suffix would make an extension module of it, which it is not.
LIB = "libboft_native.so"
INFO = "_build_info.json"  # beside LIB: what it was built from, or why there is none
MIN_TORCH = (2, 10)  # the first whose stable ABI has parallel_for
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"


class BuildError(RuntimeError):
    """The library cannot be built, or its build failed; the message is meant for the user."""


class SettingError(BuildError):
    """An environment variable asks for something impossible: never an occasion to go on without."""


class Torch(NamedTuple):
    root: Path
    version: str
    cuda: str | None


class Plan(NamedTuple):
    nvcc: str | None  # None: the CPU kernels alone
    why: str


def flag(name: str) -> bool:
    """Whether an environment variable is on; anything that is neither on nor off is an error."""
    value = os.environ.get(name, "").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    raise SettingError(f"{name}: expected 0 or 1, got {os.environ[name]!r}")


def words(name: str) -> list[str]:
    """A variable that holds a part of a command line."""
    try:
        return shlex.split(os.environ.get(name, ""))
    except ValueError:  # a quotation mark without another
        raise SettingError(f"{name}: expected shell words, got {os.environ[name]!r}") from None


def wanted_cuda() -> str:
    want = os.environ.get("BOFT_OPS_CUDA", "").strip().lower() or "auto"
    if want not in ("auto", "0", "1"):
        got = os.environ["BOFT_OPS_CUDA"]
        raise SettingError(f"BOFT_OPS_CUDA: expected auto, 0 or 1, got {got!r}")
    return want


def check_settings() -> None:
    """Raise SettingError for a value of ours that is not understood, also where it has no use."""
    for name in ("BOFT_OPS_SKIP_EXT", "BOFT_OPS_FORCE_EXT", "BOFT_OPS_DEBUG"):
        flag(name)
    wanted_cuda()


def find_torch(more: list[str] | None = None) -> Torch | None:
    """The torch to build against, found but not imported; `more` extends sys.path."""
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
    """The C++ compiler as a command prefix: $CXX, else the first of c++, g++, clang++."""
    for command in [words("CXX")] if os.environ.get("CXX") else [["c++"], ["g++"], ["clang++"]]:
        if command and shutil.which(command[0]):
            return command
    return None


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def obstacle(csrc: Path | None, torch: Torch | None) -> str | None:
    """Why the library cannot be built here, as half a sentence, or None."""
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
    return [
        *sorted(csrc.glob("*.cpp")),
        *sorted((csrc / "cpu").glob("*.cpp")),
        *(sorted((csrc / "cuda").glob("*.cu")) if cuda else []),
    ]


def source_hash(csrc: Path) -> str:
    """Identifies the sources: a library that was built from others is never loaded."""
    digest = hashlib.sha256()
    for file in sorted(csrc.rglob("*")):
        if file.suffix in (".h", ".cpp", ".cu", ".cuh"):
            digest.update(file.relative_to(csrc).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def plan(csrc: Path, torch: Torch) -> Plan:
    """Whether the CUDA kernels are compiled too. Without CUDA sources nvcc is never asked for."""
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


def write_info(folder: Path, **what) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INFO).write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")


def read_info(folder: Path) -> dict:
    try:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def note_absence(folder: Path, why: str) -> None:
    """Removes the library of an earlier build, which would go on being used, and says why."""
    (folder / LIB).unlink(missing_ok=True)
    write_info(folder, native=False, why=why)


def _gencode(archs: str) -> list[str]:
    """Torch's own notation, "8.0;9.0a;10.0+PTX" or "native", as nvcc options."""
    if archs.strip() == "native":
        return ["-arch=native"]
    options = []
    for arch in re.split(r"[;,\s]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if not match:
            raise SettingError(f'TORCH_CUDA_ARCH_LIST: expected e.g. "8.0;9.0+PTX", got {archs!r}')
        cc = match[1] + match[2]
        options.append(f"-gencode=arch=compute_{cc},code=sm_{cc}")
        if match[3]:
            options.append(f"-gencode=arch=compute_{cc},code=compute_{cc}")
    return options


def _steps(csrc: Path, torch: Torch, nvcc: str | None, work: Path, out: Path):
    """The commands, as (command, inputs, output): one for each source, and the link last."""
    cxx = compiler()
    debug = flag("BOFT_OPS_DEBUG")
    common = ["-O0", "-g", "-UNDEBUG"] if debug else ["-O3", "-DNDEBUG"]
    host = [*common, "-fPIC", "-fvisibility=hidden"]
    # no folder of the build machine in error messages
    host.append(f"-ffile-prefix-map={csrc}=csrc")
    # GCC only: else two copies of the library in one process share their static variables
    if "clang" not in os.path.basename(os.path.realpath(shutil.which(cxx[0]))):
        host.append("-fno-gnu-unique")
    host += ["-std=c++17", "-Wall", f"-I{csrc}"]
    host += ["-isystem", str(torch.root / "include")]
    host += ["-isystem", str(torch.root / "include" / "torch" / "csrc" / "api" / "include")]
    host += ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    host += ["-DBOFT_OPS_CUDA"] if nvcc else []
    host += words("CXXFLAGS")
    ldflags = words("LDFLAGS")
    device = [*common, "-std=c++17", f"-I{csrc}", "--expt-relaxed-constexpr"]
    device += ["--threads", "2", "-ccbin", cxx[0], "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    device += ["-Xcompiler", f"-ffile-prefix-map={csrc}=csrc"]
    device += _gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS) if nvcc else []

    steps, objects = [], []
    for source in sources(csrc, bool(nvcc)):
        obj = work / source.relative_to(csrc).with_suffix(source.suffix + ".o")
        start = [nvcc, *device] if source.suffix == ".cu" else [*cxx, *host]
        command = [*start, "-MD", "-MF", f"{obj}.d", "-c", str(source), "-o", str(obj)]
        steps.append((command, [source], obj))
        objects.append(obj)
    # Of torch, the stable C ABI and nothing else; the CUDA runtime is static. So one library loads
    # beside any torch. nvcc links in its own runtime, wherever that lies.
    torch_lib = [f"-L{torch.root / 'lib'}", "-ltorch_cpu"]
    if nvcc:
        link = [nvcc, "-shared", "-cudart", "static", "-ccbin", cxx[0]]
        checks = ["-Xlinker", "--no-undefined", "-Xlinker", "--exclude-libs=ALL"]
    else:
        link = [*cxx, "-shared"]
        checks = ["-Wl,--no-undefined", "-Wl,--exclude-libs=ALL"]
    command = [*link, "-o", str(out), *map(str, objects), *torch_lib, *checks, *ldflags]
    return [*steps, (command, objects, out)]


def _ninja() -> str | None:
    # A virtual environment's own bin is not on PATH when its python is called by path.
    return shutil.which("ninja", path=os.path.dirname(sys.executable)) or shutil.which("ninja")


def _run(command: list[str], verbose: bool) -> None:
    if verbose:
        print(shlex.join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if verbose or done.returncode:
        print(done.stdout, end="", file=sys.stderr, flush=True)
    if done.returncode:
        error = re.search(r"^.*(?:error|undefined reference).*$", done.stdout, re.M | re.I)
        raise BuildError(f"the compiler failed: {error[0].strip() if error else command[0]}")


def _ninja_file(steps) -> str:
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
    """Compile csrc into the library `out`, INFO beside it; `work` keeps objects for next time."""
    chosen = plan(csrc, torch)
    csrc, work, out = csrc.resolve(), work.resolve(), out.resolve()
    # before the compiler reads the sources: an edit meanwhile then makes the library stale
    built_from = source_hash(csrc)
    steps = _steps(csrc, torch, chosen.nvcc, work, out)
    for _, _, output in steps:
        output.parent.mkdir(parents=True, exist_ok=True)
    (out.parent / INFO).unlink(missing_ok=True)  # never a new library with an old description
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not (jobs.isdecimal() and int(jobs)):
        raise SettingError(f"MAX_JOBS: expected a positive number, got {jobs!r}")
    if ninja := _ninja():
        (work / "build.ninja").write_text(_ninja_file(steps))
        limit = ["-j", jobs] if jobs else []
        _run([ninja, "-C", str(work), *limit, *(["-v"] if verbose else [])], verbose)
    else:
        with ThreadPoolExecutor(int(jobs or os.cpu_count() or 1)) as pool:
            list(pool.map(lambda step: _run(step[0], verbose), steps[:-1]))
        _run(steps[-1][0], verbose)
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    write_info(
        out.parent,
        native=True,
        source_hash=built_from,
        devices=chosen.why,
        archs=archs if chosen.nvcc else None,
        debug=flag("BOFT_OPS_DEBUG"),
        torch=torch.version,
    )
    return chosen
