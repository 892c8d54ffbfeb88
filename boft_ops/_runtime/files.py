"""Reads safetensors files, and writes files and folders that appear in one step.

Only torch and safetensors are needed.
``safetensors.torch.save`` would need numpy too, which torch does not require.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip

# The content of a file, or a function that yields it from the start: it may be called again.
Content = bytes | bytearray | Callable[[], Iterable[bytes]]


@contextmanager
def open_safetensors(path: Path) -> Iterator:
    """Yield the opened safetensors file, as ``safe_open`` returns it.

    Raises:
        ValueError: the file is truncated, is no safetensors file, or holds a dtype torch lacks.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, AttributeError) as error:  # the latter for a dtype that torch lacks
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def dtype_of_safetensors(name: str) -> torch.dtype | None:
    """The dtype of a name in the header of a safetensors file; None for one that torch lacks."""
    return next((dtype for dtype, stored in _DTYPES.items() if stored == name), None)


def encode_safetensors(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> bytearray:
    """Return the content of a safetensors file.

    Args:
        tensors: by name, on any device and with any strides.
        metadata: strings by name.

    Raises:
        ValueError: safetensors has no name for the dtype of a tensor.
    """
    content = bytearray()
    for chunk in safetensors_chunks(tensors, metadata, tensors.__getitem__):
        content += chunk
    return content


def safetensors_chunks(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    numbers: Callable[[str], torch.Tensor],
) -> Iterator[bytes | bytearray]:
    """Yield the content of a safetensors file, one tensor at a time.

    Args:
        tensors: by name; their shapes and dtypes count, so that they may be on the meta device.
        metadata: strings by name.
        numbers: returns the tensor of a name, called once for each, when its turn comes.

    Raises:
        ValueError: safetensors has no name for the dtype of a tensor, or ``numbers`` returns
            another shape or dtype.
    """
    # Large elements first, so that every tensor is aligned to its element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {"__metadata__": dict(metadata)}, 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name}: expected a dtype of safetensors, got {tensor.dtype}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype, shape = _DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, described in ordered:
        tensor = numbers(name).detach()
        if (tensor.shape, tensor.dtype) != (described.shape, described.dtype):
            raise ValueError(
                f"{name}: expected {described.dtype} of shape {tuple(described.shape)}, got "
                f"{tensor.dtype} of {tuple(tensor.shape)}"
            )
        content = bytearray(tensor.numel() * tensor.element_size())
        if tensor.numel():
            torch.frombuffer(content, dtype=tensor.dtype).copy_(tensor.flatten())
        yield content


def check_new(destination: Path) -> None:
    """Raise FileExistsError or FileNotFoundError unless it is a new name in an existing folder."""
    if os.path.lexists(destination):
        raise FileExistsError(f"destination: expected a new path, got {str(destination)!r}")
    if not destination.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"destination: expected a path in a folder, got {str(destination)!r}"
        )


def check_replaceable(path: Path) -> None:
    """Raise ValueError unless ``path`` is a regular file, a link to one, or a new name.

    Writing replaces what bears the name, which must not happen to a device, a FIFO or a folder.

    Raises:
        FileNotFoundError: the folder of a new name does not exist.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return _check_folder(path)
    if not stat.S_ISREG(mode):
        raise ValueError(f"path: expected a regular file or a new name, got {str(path)!r}")


def _check_folder(path: Path) -> None:
    if not Path(path).resolve().parent.is_dir():
        raise FileNotFoundError(f"path: expected a name in an existing folder, got {str(path)!r}")


def write_whole(path: Path, content: Content) -> None:
    """Write a file in one step: readers find the old file or the new one, also after a crash.

    A link stays a link, and an existing file keeps its permissions.

    Args:
        path: of the file.
        content: the bytes, or a function that yields them in chunks from the start.

    Raises:
        ValueError: ``path`` is a device, a FIFO or a folder.
    """
    check_replaceable(path)
    path = Path(path).resolve()
    temporary = path.with_name(f".boft_ops-{uuid.uuid4().hex}")
    try:
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
        _write_new(temporary, content, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder with its files in one step: readers find all of it or nothing.

    Raises:
        ValueError: ``path`` exists.
    """
    if os.path.lexists(path):
        raise ValueError(f"path: expected a new name, got {str(path)!r}")
    _check_folder(path)
    path = Path(path).resolve()
    temporary = path.with_name(f".boft_ops-{uuid.uuid4().hex}")
    try:
        temporary.mkdir()
        for name, content in files.items():
            _write_new(temporary / name, content)
        flush_folder(temporary)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush_folder(path.parent)


def _write_new(path: Path, content: Content, mode: int | None = None) -> None:
    """Write a new file, with these permissions, or with those of any new file.

    Until it is whole it has no name, where the file system can do that: a killed process then
    leaves nothing behind. It is never more readable than in the end.
    """
    access = 0o666 if mode is None else 0o600
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, access)
        with open(descriptor, "wb") as file:
            _write(file, content, mode)
            # src_dir_fd has no effect on this path, but Python follows the link only with it.
            os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor)
        return
    except (AttributeError, OSError):  # not Linux, or no unnamed files, no links, no /proc
        pass
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, access), "wb") as file:
        _write(file, content, mode)


def _write(file: BinaryIO, content: Content, mode: int | None) -> None:
    for chunk in content() if callable(content) else [content]:
        file.write(chunk)
    file.flush()
    if mode is not None and hasattr(os, "fchmod"):
        os.fchmod(file.fileno(), mode)
    os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Make the new name in this folder survive a crash of the machine."""
    if os.name == "nt":  # Windows opens no folders
        return
    # Some network file systems refuse, and so do folders that cannot be read: the file is written.
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
