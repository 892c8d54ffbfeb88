"""Files and folders appear whole, replace nothing but regular files, and need no numpy."""

import os
import stat
import subprocess
import sys

import pytest
import torch

from boft_ops._runtime.files import encode_safetensors, open_safetensors, write_folder, write_whole

TENSORS = {
    "float32": torch.randn(3, 4).t(),
    "bfloat16": torch.randn(5, dtype=torch.bfloat16),
    "float16": torch.randn(7, dtype=torch.float16, requires_grad=True),
    "float64": torch.randn(2, 2, dtype=torch.float64)[:, 1],
    "int64": torch.tensor(7),
    "bool": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("tensors", [{}, TENSORS])
def test_what_is_written_is_read(tensors, tmp_path):
    path = tmp_path / "a.safetensors"
    write_whole(path, encode_safetensors(tensors, {"format": "pt"}))
    with open_safetensors(path) as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            read = file.get_tensor(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)


def test_dtypes_without_a_name_in_safetensors():
    with pytest.raises(
        ValueError, match=r"z: expected a dtype of safetensors, got torch\.complex128"
    ):
        encode_safetensors({"z": torch.zeros(2, dtype=torch.complex128)}, {})


def test_tensors_without_values():
    with pytest.raises(NotImplementedError):
        encode_safetensors({"a": torch.zeros(2, device="meta")}, {})


def test_no_numpy(tmp_path):
    script = """
import sys, warnings
sys.modules["numpy"] = None
warnings.simplefilter("ignore")
import torch, boft_ops
model = boft_ops.adapt(torch.nn.Sequential(torch.nn.Linear(64, 64)), ["0"])
boft_ops.save_adapter(model, sys.argv[1])
boft_ops.load_adapter(torch.nn.Sequential(torch.nn.Linear(64, 64)), sys.argv[1])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "a.safetensors")]
    subprocess.run(command, check=True)


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_permissions(tmp_path, umask):
    path = tmp_path / "file"
    write_whole(path, b"first")
    assert mode_of(path) == 0o640
    path.chmod(0o604)
    write_whole(path, b"second")
    assert mode_of(path) == 0o604
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"first")
    link.symlink_to(target)
    write_whole(link, b"second")
    assert link.is_symlink()
    assert target.read_bytes() == b"second"


@pytest.mark.parametrize("special", ["folder", "fifo", "link to a fifo", "device"])
def test_only_regular_files_are_replaced(special, tmp_path):
    path = tmp_path / "path"
    if special == "folder":
        path.mkdir()
    elif special == "device":
        path.symlink_to("/dev/null")
    elif special == "fifo":
        os.mkfifo(path)
    else:
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to("fifo")
    before = os.stat(path)
    with pytest.raises(ValueError, match=f"path: expected a regular file.*{path}"):
        write_whole(path, b"")
    assert os.stat(path).st_ino == before.st_ino
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file(failing, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    path = tmp_path / "file"
    write_whole(path, b"first")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def unnamed_files(folder):
    """True if the file system of this folder has files without a name."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
    except (AttributeError, OSError):
        return False
    return True


def test_a_killed_process_leaves_nothing(tmp_path):
    if not unnamed_files(tmp_path):
        pytest.skip("no unnamed files here")
    path = tmp_path / "file"
    write_whole(path, b"first")
    script = """
import os, signal, sys
from boft_ops._runtime.files import write_whole
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
write_whole(sys.argv[1], b"second" * 1000)
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)])
    assert done.returncode == -9
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"first"


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o604])
def test_content_is_never_more_readable_than_in_the_end(mode, named, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("no links here")

    seen = []
    write = os.fchmod

    def watch(descriptor, wanted):
        seen.append(os.fstat(descriptor).st_mode & 0o777)
        write(descriptor, wanted)

    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    if named:
        monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fchmod", watch)
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert mode_of(path) == mode
    assert set(seen) == {0o600}
    assert os.listdir(tmp_path) == ["file"]


def test_folders(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    write_folder(path, {"a": b"1", "b": b"2"})
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {"a": b"1", "b": b"2"}
    with pytest.raises(ValueError, match="path: expected a new name"):
        write_folder(path, {})
    with pytest.raises(TypeError):
        write_folder(tmp_path / "other", {"a": b"1", "b": None})
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("write", [lambda p: write_whole(p, b""), lambda p: write_folder(p, {})])
def test_a_folder_that_does_not_exist(write, tmp_path):
    path = tmp_path / "none" / "file"
    with pytest.raises(FileNotFoundError, match=f"path: expected a name in .* got '{path}'"):
        write(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 99])
def test_files_that_are_no_safetensors(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    error = pytest.raises(ValueError, match=f"{path}: not a whole safetensors file")
    with error, open_safetensors(path):
        pass
