"""Every way to install the package, with and without a native library."""

import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STATUS = """
import boft_ops
from boft_ops._runtime import native
print(native.status)
print(native.library)
print(boft_ops.__file__)
"""


def names(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as wheel:
        return set(wheel.namelist())


def build_info(wheel: Path) -> dict:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("boft_ops/_build_info.json"))


def status(run, *path, **env):
    """Status and path of the library and path of the package, as a new process prints them."""
    done = run("-c", STATUS, path=path, **env)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_wheel_is_for_every_python_and_complete(wheel):
    assert wheel.name.startswith("boft_ops-0.1.0-py3-none-linux_")
    shipped = names(wheel)
    expected = {"boft_ops/libboft_native.so", "boft_ops/_build_info.json", "boft_ops/LICENSE"}
    expected |= {f"boft_ops-0.1.0.dist-info/{f}" for f in ("METADATA", "licenses/LICENSE")}
    for package, folder in {"": "boft_ops", "csrc/": "csrc", "triton_kernels/": "triton"}.items():
        for suffix in ("py", "json", "typed", "h", "cpp", "cu", "cuh"):
            for file in (ROOT / folder).rglob(f"*.{suffix}"):
                if file.name != "_build_info.json":
                    inside = file.relative_to(ROOT / folder).as_posix()
                    expected.add(f"boft_ops/{package}{inside}")
    assert expected - shipped == set()
    others = {n for n in shipped - expected if not n.startswith("boft_ops-0.1.0.dist-info/")}
    assert others == set()
    assert "boft_ops/triton_kernels/__init__.py" not in shipped


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("boft_ops-0.1.0.dist-info/METADATA").decode()
    for line in (
        "Name: boft_ops",
        "Version: 0.1.0",
        "License-Expression: MIT",
        "Requires-Python: >=3.10",
        "Requires-Dist: torch>=2.10",
        'Requires-Dist: triton>=3.6; platform_system == "Linux"',
        "Requires-Dist: safetensors>=0.4",
    ):
        assert line in text.splitlines()


def test_console_command(wheel, run, installed):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("boft_ops-0.1.0.dist-info/entry_points.txt").decode()
    assert text.split("\n")[:2] == ["[console_scripts]", "boft-ops = boft_ops.__main__:console"]
    code = "import sys; from boft_ops.__main__ import console; sys.exit(console())"
    done = run("-c", code, "analysis", "8", "4", path=[installed])
    assert done.stdout.startswith("features d ")


def test_installed_wheel_loads_its_library(run, installed):
    state, library, file = status(run, installed)
    assert state.startswith("loaded (")
    assert library == str(installed / "boft_ops" / "libboft_native.so")
    assert file == str(installed / "boft_ops" / "__init__.py")


def test_library_names_no_folder_of_the_build_machine(installed):
    content = (installed / "boft_ops" / "libboft_native.so").read_bytes()
    assert b"pytest-of-" not in content


@pytest.mark.exhaustive
def test_sdist_makes_the_same_wheel(run, new_tree, wheel, tmp_path):
    sdist = run.build("sdist", new_tree(), tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    tree = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert not list(tree.rglob("*.so"))
    assert not list(tree.rglob("_build_info.json"))
    again = run.build("wheel", tree, tmp_path / "wheel", BOFT_OPS_FORCE_EXT="1")
    assert again.name == wheel.name
    assert names(again) == names(wheel)


def test_a_deleted_file_is_not_shipped_by_the_next_wheel(run, new_tree, tmp_path):
    tree = new_tree()
    (tree / "boft_ops" / "gone.py").touch()
    env = {"BOFT_OPS_SKIP_EXT": "1"}
    assert "boft_ops/gone.py" in names(run.build("wheel", tree, tmp_path / "1", **env))
    (tree / "boft_ops" / "gone.py").unlink()
    assert "boft_ops/gone.py" not in names(run.build("wheel", tree, tmp_path / "2", **env))


def leave_one_source(tree: Path) -> None:
    """Make csrc/ quick to compile, where only the steps of a build are tested."""
    shutil.rmtree(tree / "csrc")
    (tree / "csrc" / "cpu").mkdir(parents=True)
    (tree / "csrc" / "binding.cpp").write_text("int one();\nint two() { return 2 * one(); }\n")
    (tree / "csrc" / "cpu" / "one.cpp").write_text("int one() { return 1; }\n")


WITHOUT_OTHERS = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
"""


@pytest.mark.exhaustive
def test_editable_install_maps_the_folders(run, new_tree, unpack, tmp_path, needs_compiler):
    tree = new_tree()
    (tree / "triton" / "marker_of_this_tree.py").touch()
    site = unpack(run.build("editable", tree, tmp_path, BOFT_OPS_FORCE_EXT="1"))
    code = f"""
import site, sys
sys.path.insert(0, {str(site)!r})  # first, because the environment has a finder of the same name
site.addsitedir({str(site)!r})
import boft_ops, boft_ops.triton_kernels.marker_of_this_tree as kernel
from boft_ops._runtime import native
print(boft_ops.__file__, kernel.__file__, native.library, {str(tree)!r} in sys.path)
"""
    # An editable install in the environment of the tests must not be imported instead.
    done = run("-c", WITHOUT_OTHERS + code)
    package = tree / "boft_ops"
    expected = [package / "__init__.py", tree / "triton" / "marker_of_this_tree.py"]
    expected += [package / "libboft_native.so", False]
    assert done.stdout.split() == [str(item) for item in expected]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_uninstalled_checkout(run, new_tree, needs_compiler):
    """A checkout works without an install, says how to build the library, and builds it."""
    tree = new_tree()
    (tree / "triton" / "marker_of_this_tree.py").touch()
    cache = tree / "cache"
    code = """
import boft_ops.triton_kernels.marker_of_this_tree as kernel
print(kernel.__file__)
from boft_ops.__main__ import main
assert main(["build"]) == main(["build"]) == 0
"""
    done = run("-c", STATUS + code, path=[tree], BOFT_OPS_CACHE=str(cache))
    state, library, _, kernel, first, second = done.stdout.splitlines()
    assert state == "absent: this copy was never built; `python -m boft_ops build` compiles it"
    assert library == "None"
    assert kernel == str(tree / "triton" / "marker_of_this_tree.py")
    assert first.startswith(f"built {cache}/")
    assert second.startswith(f"nothing to build: {cache}/")

    state, library, _ = status(run, tree, BOFT_OPS_CACHE=str(cache))
    assert state.startswith("loaded (")
    assert library.startswith(f"{cache}/")


PURE = {
    "skipped": ({"BOFT_OPS_SKIP_EXT": "1"}, "BOFT_OPS_SKIP_EXT=1"),
    "no compiler": ({"CXX": "no-such-c++"}, "no C++ compiler: CXX=no-such-c++ not found"),
    "does not compile": ({"CXXFLAGS": "-no-such-flag"}, "the compiler failed: "),
}


@pytest.mark.parametrize(("env", "why"), PURE.values(), ids=PURE)
def test_pure_install_records_the_reason(run, new_tree, tmp_path, needs_compiler, env, why):
    tree = new_tree()
    wheel = run.build("wheel", tree, tmp_path, **env)
    assert wheel.name == "boft_ops-0.1.0-py3-none-any.whl"
    assert "boft_ops/libboft_native.so" not in names(wheel)
    assert build_info(wheel)["why"].startswith(why)
    done = run.build("wheel", tree, tmp_path / "forced", fails=True, BOFT_OPS_FORCE_EXT="1", **env)
    assert f"BOFT_OPS_FORCE_EXT=1, but: {why}" in done.stderr


def test_pure_install_works_and_states_the_reason(run, new_tree, unpack, tmp_path):
    env, why = PURE["no compiler"]
    site = unpack(run.build("wheel", new_tree(), tmp_path, **env))
    code = "import torch; assert boft_ops.cayley(torch.zeros(3)).equal(torch.eye(3))"
    done = run("-c", STATUS + code, path=[site])
    state, library, _ = done.stdout.splitlines()
    assert state == f"absent: {why}; `python -m boft_ops build` compiles it"
    assert library == "None"


WRONG = {
    "BOFT_OPS_SKIP_EXT": ("maybe", "BOFT_OPS_SKIP_EXT: expected 0 or 1, got 'maybe'"),
    "BOFT_OPS_CUDA": ("yes", "BOFT_OPS_CUDA: expected auto, 0 or 1, got 'yes'"),
    "MAX_JOBS": ("many", "MAX_JOBS: expected a positive number, got 'many'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_an_error(run, new_tree, tmp_path, needs_compiler, name):
    value, message = WRONG[name]
    done = run.build("wheel", new_tree(), tmp_path, fails=True, **{name: value})
    assert message in done.stderr


@pytest.mark.parametrize("front_end", ["ninja", "none"])
def test_builds_with_and_without_ninja(run, new_tree, tmp_path, needs_compiler, front_end):
    hide = "b.find_ninja = lambda: None" if front_end == "none" else ""
    tree = new_tree()
    leave_one_source(tree)
    code = f"""
import sys
sys.path.insert(0, "boft_ops/_runtime")
import pathlib, build as b
{hide}
plan = b.compile_library(
    pathlib.Path("csrc"), b.find_torch(), pathlib.Path("work"), pathlib.Path("out", b.LIB))
assert plan.nvcc is None or (b.find_nvcc() and b.find_torch().cuda)
assert pathlib.Path("out", b.LIB).is_file() and b.read_info(pathlib.Path("out"))["native"]
assert pathlib.Path("work", "build.ninja").exists() == ({front_end!r} == "ninja")
"""
    run("-c", code, cwd=tree)


LIBRARIES = """
import importlib, warnings
for name in ("stale", "broken", "cut_short", "same"):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        native = importlib.import_module(f"{name}._runtime.native")
    print(native.status)
    assert (native.library is None) == (name != "same")
    assert len(said) == (name != "same"), said
    for warning in said:
        assert warning.category is RuntimeWarning
        assert "running without it" in str(warning.message)
"""


def test_a_stale_or_broken_library_is_refused(run, installed, tmp_path):
    for name in ("stale", "broken", "cut_short", "same"):
        shutil.copytree(installed / "boft_ops", tmp_path / name)
    with (tmp_path / "stale" / "csrc" / "binding.cpp").open("a") as file:
        file.write("// edited\n")
    (tmp_path / "broken" / "libboft_native.so").write_bytes(b"not a library")
    whole = (tmp_path / "same" / "libboft_native.so").read_bytes()
    (tmp_path / "cut_short" / "libboft_native.so").write_bytes(whole[: len(whole) // 2])
    done = run("-c", LIBRARIES, path=[tmp_path])
    stale, broken, cut_short, same = done.stdout.splitlines()
    assert stale.startswith("stale: ")
    assert "was built from other sources than" in stale
    assert broken.startswith("broken: ")
    assert cut_short.endswith("the file is cut short")
    assert same.startswith("loaded (")


def test_a_failed_build_removes_the_earlier_library(run, new_tree, tmp_path, needs_compiler):
    tree = new_tree()
    leave_one_source(tree)
    run.build("editable", tree, tmp_path / "1", BOFT_OPS_FORCE_EXT="1")
    assert (tree / "boft_ops" / "libboft_native.so").is_file()
    run.build("editable", tree, tmp_path / "2", CXXFLAGS="-no-such-flag")
    assert not (tree / "boft_ops" / "libboft_native.so").exists()
    info = json.loads((tree / "boft_ops" / "_build_info.json").read_text())
    assert info["why"].startswith("the compiler failed: ")
