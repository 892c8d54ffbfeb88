"""The folder of the cache, and the libraries in it that are trusted."""

import os
import stat
import sys
import warnings
from pathlib import Path

import pytest

from boft_ops._runtime import build, native, paths

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libraries are built on Linux")


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.delenv("BOFT_OPS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("value", ["cache", "./cache", "../cache", "~/cache", ""])
def test_a_relative_xdg_cache_is_ignored(value, home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.chdir(home)
    assert native.cache_folder() == home / ".cache" / "boft_ops"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert native.cache_folder() == home / "xdg" / "boft_ops"


def test_a_relative_home_is_no_folder_of_libraries(home, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "home")
    with pytest.raises(RuntimeError, match="HOME: expected an absolute path, got 'home'"):
        native.cache_folder()


@pytest.fixture
def cached(home, monkeypatch):
    """A library in the cache of a copy that has none of its own."""
    if paths.csrc() is None:
        pytest.skip("a copy without C++ sources")
    monkeypatch.setenv("BOFT_OPS_CACHE", str(home))
    monkeypatch.setattr(paths, "HERE", home / "package")
    path = native._cached(build.source_hash(paths.csrc()), cuda=False)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"library")
    for item in (path, path.parent):
        item.chmod(0o755)
    return path


def candidates():
    faults = []
    return list(native._candidates(faults)), faults


def test_a_cached_library_of_this_user_or_of_root_is_loaded(cached, monkeypatch):
    assert candidates() == ([cached], [])
    uid = cached.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert candidates()[0] == ([cached] if uid == 0 else [])


@pytest.mark.parametrize("of", ["file", "folder"])
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_cached_library_that_others_may_write_is_not_loaded(of, mode, cached):
    path = cached if of == "file" else cached.parent
    path.chmod(mode)
    found, (fault,) = candidates()
    assert found == []
    assert fault == f"not trusted: {cached}: other users may write to {path} (chmod go-w)"


@pytest.mark.parametrize("of", ["file", "folder"])
def test_a_cached_library_of_another_user_is_not_loaded(of, cached, monkeypatch):
    path, plain = cached if of == "file" else cached.parent, Path.stat

    def of_another(self, **options):
        result = plain(self, **options)
        if self != path:
            return result
        values = list(result)
        values[stat.ST_UID] = os.geteuid() + 1
        return os.stat_result(values)

    monkeypatch.setattr(Path, "stat", of_another)
    found, (fault,) = candidates()
    assert found == []
    assert f"{path} belongs to another user, of number {os.geteuid() + 1}" in fault


def test_the_refusal_is_told_and_nothing_is_opened(cached, monkeypatch):
    cached.chmod(0o777)
    monkeypatch.setattr(native, "_open", lambda *_: pytest.fail("opened"))
    monkeypatch.setattr(native, "NS", "no_such_namespace")
    for name in ("status", "library", "isa", "_lib", "_kernels", "_untold"):
        monkeypatch.setattr(native, name, getattr(native, name))
    with pytest.warns(RuntimeWarning, match="native library is not trusted: .*running without it"):
        assert not native.load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.tell_absence()  # it was told already


def test_what_is_built_is_closed_to_others(home, monkeypatch):
    monkeypatch.setenv("BOFT_OPS_CACHE", str(home / "cache"))
    if build.obstacle(paths.csrc(), build.find_torch()):
        pytest.skip("nothing can be built here")

    def compile_library(csrc, torch, work, out, verbose=False):
        out.parent.mkdir()
        for name in (build.LIB, build.INFO):
            (out.parent / name).write_bytes(b"")

    monkeypatch.setattr(build, "compile_library", compile_library)
    before = os.umask(0o002)
    try:
        path = native.build()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o022 == 0
