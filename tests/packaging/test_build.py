"""The decisions that the build makes before it compiles anything."""

import os
import sys
from pathlib import Path

import pytest

from boft_ops._runtime import build, native, paths

CPU_TORCH = build.Torch(Path("torch"), "2.13.0+cpu", None)
CUDA_TORCH = build.Torch(Path("torch"), "2.13.0+cu130", "13.0")


def test_the_library_under_test_is_loaded(needs_compiler):
    """Without it every other test would pass on the fallback and hide a broken build."""
    if os.environ.get("BOFT_OPS_SKIP_EXT") == "1":
        pytest.skip("BOFT_OPS_SKIP_EXT=1")
    assert native.library is not None, native.status


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_pure(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    why = build.obstacle(paths.csrc(), CPU_TORCH)
    assert why == f"the native library is built on Linux only (this is {platform})"


@pytest.mark.skipif(sys.platform != "linux", reason="built on Linux only")
def test_obstacles(monkeypatch, tmp_path, needs_compiler):
    csrc = paths.csrc()
    assert build.obstacle(csrc, CPU_TORCH) is None
    assert build.obstacle(None, CPU_TORCH) == "this copy has no C++ sources"
    assert build.obstacle(tmp_path, CPU_TORCH) == "this copy has no C++ sources"
    assert build.obstacle(csrc, None).startswith("torch is not visible to the build")
    old = CPU_TORCH._replace(version="2.9.1")
    assert build.obstacle(csrc, old).startswith("torch 2.9.1 is older than 2.10")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.obstacle(csrc, CPU_TORCH) == "no C++ compiler (c++, g++)"


@pytest.fixture
def cuda_sources(tmp_path):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "op.cu").touch()
    return tmp_path


@pytest.mark.parametrize("want", ["auto", "0", "1"])
def test_without_cuda_sources_nvcc_is_not_looked_for(monkeypatch, tmp_path, want):
    monkeypatch.setenv("BOFT_OPS_CUDA", want)
    monkeypatch.setattr(build, "find_nvcc", lambda: pytest.fail("looked for nvcc"))
    (tmp_path / "cuda").mkdir()
    assert build.plan(tmp_path, CUDA_TORCH).nvcc is None


@pytest.mark.parametrize(
    ("want", "torch", "nvcc", "expected"),
    [
        ("auto", CUDA_TORCH, "nvcc", "nvcc"),
        ("auto", CUDA_TORCH, None, None),
        ("auto", CPU_TORCH, "nvcc", None),
        ("1", CPU_TORCH, "nvcc", "nvcc"),
        ("0", CUDA_TORCH, "nvcc", None),
    ],
)
def test_when_cuda_is_compiled(monkeypatch, cuda_sources, want, torch, nvcc, expected):
    monkeypatch.setenv("BOFT_OPS_CUDA", want)
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)
    assert build.plan(cuda_sources, torch).nvcc == expected


def test_required_cuda_needs_nvcc(monkeypatch, cuda_sources):
    monkeypatch.setenv("BOFT_OPS_CUDA", "1")
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(build.SettingError, match="BOFT_OPS_CUDA=1, but there is no nvcc"):
        build.plan(cuda_sources, CUDA_TORCH)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("BOFT_OPS_SKIP_EXT", "maybe", "0 or 1"),
        ("BOFT_OPS_FORCE_EXT", "2", "0 or 1"),
        ("BOFT_OPS_DEBUG", "full", "0 or 1"),
        ("BOFT_OPS_CUDA", "yes", "auto, 0 or 1"),
    ],
)
def test_a_setting_is_understood_or_refused(
    monkeypatch, run, needs_compiler, name, value, expected
):
    """Settings are checked even if the build does not need them, as here."""
    monkeypatch.setenv(name, value)
    match = f"{name}: expected {expected}, got '{value}'"
    with pytest.raises(build.SettingError, match=match):
        native.build()
    setup = paths.ROOT / "setup.py"
    if paths.in_checkout():
        done = run(setup, "--version", fails=True, **{"BOFT_OPS_SKIP_EXT": "1", name: value})
        assert done.stderr == f"boft_ops: {match}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="built on Linux only")
@pytest.mark.parametrize("name", ["CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS"])
def test_a_compiler_setting_is_understood_or_refused(monkeypatch, tmp_path, needs_compiler, name):
    monkeypatch.setenv(name, "'")
    with pytest.raises(build.SettingError, match=f'{name}: expected .*, got "\'"'):
        build.compile_library(paths.csrc(), CPU_TORCH, tmp_path, tmp_path / build.LIB)


def test_architectures():
    assert build.gencode("8.0; 9.0a 10.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    with pytest.raises(build.SettingError, match="TORCH_CUDA_ARCH_LIST: expected"):
        build.gencode("Hopper")


def test_the_hash_follows_content_and_names(tmp_path):
    def current_hash():
        return build.source_hash(tmp_path)

    (tmp_path / "cpu").mkdir()
    seen = {current_hash()}
    (tmp_path / "cpu" / "a.cpp").write_text("1")
    seen.add(current_hash())
    (tmp_path / "cpu" / "a.cpp").write_text("2")
    seen.add(current_hash())
    (tmp_path / "cpu" / "a.cpp").rename(tmp_path / "cpu" / "b.cpp")
    last = current_hash()
    seen.add(last)
    assert len(seen) == 4
    (tmp_path / "cpu" / "notes.txt").touch()
    assert current_hash() == last
