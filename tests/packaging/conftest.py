"""Fixtures of the packaging tests, which use copies of the source tree and no network."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "Makefile"),
    *("boft_ops", "csrc", "triton"),
)
BUILT = ("*.so", "_build_info.json", "__pycache__", "*.pyc")
ENVIRONMENT = dict(os.environ)  # copied before any test runs, because PEFT sets CXX to gcc


def has_compiler() -> bool:
    """Return True if this machine can compile the library."""
    names = [ENVIRONMENT["CXX"].split()[0]] if ENVIRONMENT.get("CXX") else ["c++", "g++", "clang++"]
    return sys.platform == "linux" and any(map(shutil.which, names))


@pytest.fixture(scope="session")
def needs_compiler():
    if not has_compiler():
        pytest.skip("no C++ compiler")


def pytest_collection_modifyitems(items):
    """Keep all tests that share the wheel in one process when several processes run the tests."""
    folder = Path(__file__).parent
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("packaging"))


class Runner:
    """Runs the interpreter of the tests in a clean environment, with given folders on its path."""

    def __init__(self, home: Path):
        self.home = home

    def __call__(self, *args, **options):
        return self.command(sys.executable, *args, **options)

    def command(self, *args, path=(), cwd=None, fails=False, **env):
        """Run any command; its Python finds the folders of `path` first."""
        keep = {
            name: value
            for name, value in ENVIRONMENT.items()
            if not name.startswith(("BOFT_OPS_", "PYTHON", "TRITON_", "COV_"))
        }
        keep |= {"OMP_NUM_THREADS": "1", "BOFT_OPS_CACHE": str(self.home / "cache")}
        keep |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PIP_NO_INPUT": "1"}
        keep["CXXFLAGS"] = "-O0"  # compiles quickly; no test here depends on the library's speed
        done = subprocess.run(
            list(map(str, args)),
            cwd=cwd or self.home,
            env=keep | env,
            capture_output=True,
            text=True,
        )
        assert (done.returncode != 0) == fails, f"{args}\n{done.stdout}\n{done.stderr}"
        return done

    def build(self, hook, tree: Path, out: Path, fails=False, **env):
        """Call a hook of the build backend in `tree`, as a front end without isolation does.

        Returns the path of what the hook made, or the finished process if the hook should fail.
        """
        out.mkdir(parents=True, exist_ok=True)
        code = f"import setuptools.build_meta as b; print('made', b.build_{hook}({str(out)!r}))"
        done = self("-c", code, cwd=tree, fails=fails, **env)
        return done if fails else out / done.stdout.rpartition("made ")[2].strip()


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def new_tree(tmp_path_factory):
    """Return a function that makes a clean copy of the source tree."""

    def copy() -> Path:
        tree = tmp_path_factory.mktemp("tree")
        for name in SHIPPED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns(*BUILT))
            elif source.is_file():
                shutil.copy(source, tree / name)
        return tree

    return copy


@pytest.fixture(scope="session")
def unpack(tmp_path_factory):
    """Return a function that unpacks a wheel into a new folder."""

    def extract(wheel: Path) -> Path:
        folder = tmp_path_factory.mktemp("wheel")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        return folder

    return extract


@pytest.fixture(scope="session")
def wheel(run, new_tree, tmp_path_factory, needs_compiler) -> Path:
    """Build the wheel as `pip wheel --no-build-isolation .` does."""
    out = tmp_path_factory.mktemp("out")
    pip = ("-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-q")
    run(*pip, "-w", out, new_tree(), BOFT_OPS_FORCE_EXT="1")
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(run, wheel, tmp_path_factory) -> Path:
    """Install the wheel into a new folder of packages."""
    target = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel)
    return target
