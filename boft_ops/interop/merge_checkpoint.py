"""Merges an adapter into the files of a pretrained model, one tensor at a time.

No model is built. Every file of the checkpoint is read and written once, so that memory holds one
tensor, however large the model is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from .._runtime.checks import FLOATING
from .._runtime.files import (
    check_new,
    dtype_of_safetensors,
    flush_folder,
    open_safetensors,
    safetensors_chunks,
    write_whole,
)
from ..nn.wrappers import dotted
from ..ops.merge import merge_weight
from ..ops.rotation import SkewRotation
from .formats.checkpoint import INDEX, Checkpoint, LayerState, fitted, weight_files
from .formats.reader import read_checkpoint

STATE = "merging.json"  # in the temporary folder, tells what is merged there
ROWS = 1 << 26  # numbers of a weight that are rotated at a time, 256 MiB in float32
# Other files with weights, which would keep the pretrained ones.
_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")


@dataclass
class MergedFile:
    """A file of the merged checkpoint, with what changes in it.

    Attributes:
        source: the file of the pretrained model.
        shapes: shape and dtype of every tensor, as tensors on the meta device.
        metadata: of the source.
        layers: the layer whose rotation goes into a tensor, by the name of the tensor.
        replaced: further tensors of the adapter, such as trained heads and biases.
    """

    source: Path
    shapes: dict[str, torch.Tensor]
    metadata: dict[str, str]
    layers: dict[str, LayerState] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Shapes and dtypes of the tensors that are written."""
        new = {name: t for name, t in self.replaced.items() if name not in self.shapes}
        return self.shapes | new


def merge_checkpoint(
    base: str | os.PathLike,
    destination: str | os.PathLike,
    adapter: str | os.PathLike,
    *,
    prefix: str | None = None,
    report: Callable[[str], None] | None = None,
) -> list[MergedFile]:
    """Write a checkpoint whose weights are merged with an adapter.

    Weights are merged in at least float32 and rounded once, and keep their dtypes, files and names.
    A folder keeps its other files too, such as the config and the tokenizer, except for weights in
    other formats and what lies in folders inside.
    The destination appears whole or not at all. After a crash the same call goes on where the
    former one was: finished files lie in a folder ``.boft_ops-merging-NAME`` beside it.

    Args:
        base: a safetensors file, or a folder of them, with or without an index.
        destination: a file if ``base`` is one, else a folder; it must not exist.
        adapter: a checkpoint that ``convert`` reads: a file of ``save_adapter``, a PEFT folder, or
            a LyCORIS file.
        prefix: as for ``convert``.
        report: gets a line for every finished file; None for no reports.

    Returns:
        The files that were written, with the tensors that were merged into each.

    Raises:
        FileNotFoundError: there is no base, no adapter, or no folder for the destination.
        FileExistsError: the destination exists.
        ValueError: the adapter does not fit the base, whose weights must be floating-point numbers
            of at least 16 bits; or a file cannot be read. Nothing has been written then.
    """
    base, destination = Path(base), Path(destination)
    check_new(destination)
    files = plan_merge(base, adapter, prefix=prefix)
    report = report or (lambda line: None)
    if base.is_file():
        write_whole(destination, partial(_chunks, files[0]))
        report(_line(0, files))
        return files
    temporary = destination.absolute().with_name(f".boft_ops-merging-{destination.name}")
    _start(temporary, {"base": _stamp(base), "adapter": _stamp(Path(adapter)), "prefix": prefix})
    for i, file in enumerate(files):
        target = temporary / file.source.name
        is_done = target.exists()
        if not is_done:
            write_whole(target, partial(_chunks, file))
        report(_line(i, files) + (" (was there)" if is_done else ""))
    for source in _others(base, files):
        if source.name == INDEX:
            write_whole(temporary / INDEX, _index(source, files))
        else:
            shutil.copyfile(source, temporary / source.name)
    (temporary / STATE).unlink()
    flush_folder(temporary)
    os.rename(temporary, destination)
    flush_folder(destination.absolute().parent)
    return files


def plan_merge(
    base: str | os.PathLike, adapter: str | os.PathLike | Checkpoint, *, prefix: str | None = None
) -> list[MergedFile]:
    """Find the tensors that an adapter is merged into, by names and shapes alone.

    Args:
        base, prefix: as for ``merge_checkpoint``.
        adapter: a path as for ``merge_checkpoint``, or what ``read_checkpoint`` returned.

    Returns:
        The files of the checkpoint, in the order in which they are written.

    Raises:
        FileNotFoundError, ValueError: as for ``merge_checkpoint``.
    """
    files = [_opened(path) for path in weight_files(Path(base))]
    if not isinstance(adapter, Checkpoint):
        adapter = read_checkpoint(adapter, base=base, prefix=prefix)
    owners = {name: file for file in files for name in file.shapes}
    for layer_name, layer in adapter.layers.items():
        name = dotted(layer_name, "weight")
        if name not in owners:
            raise ValueError(
                f"base: expected a tensor {name!r}, got none of that name among {len(owners)}, "
                f"such as {sorted(owners)[:2]}"
            )
        shape = owners[name].shapes[name]
        if shape.dtype not in FLOATING:
            raise ValueError(
                f"base: {name}: expected floating-point numbers of at least 16 bits, got "
                f"{shape.dtype}: a quantized weight cannot hold a rotated one"
            )
        fitted(layer, tuple(shape.shape), layer_name)
        owners[name].layers[name] = layer
    for name, tensor in adapter.others.items():
        owner = owners.get(name, files[-1])  # new ones, such as a head, go to the last file
        expected = owner.shapes.get(name, tensor)
        if tensor.shape != expected.shape:
            raise ValueError(
                f"base: {name}: expected the adapter's shape {tuple(tensor.shape)}, got "
                f"{tuple(expected.shape)}"
            )
        owner.replaced[name] = tensor
    return files


@torch.no_grad()
def merged_tensor(weight: torch.Tensor, layer: LayerState) -> torch.Tensor:
    """``merge_weight`` for the state of a layer, some rows at a time if they are independent."""
    config = layer.config
    blocks = SkewRotation(layer.skew, config.method).blocks()
    if config.side == "out":
        return merge_weight(weight, blocks, layer.scale, side="out")
    rows = max(1, ROWS // max(1, weight[0].numel()))
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        scale = None if layer.scale is None else layer.scale[part]
        merged[part] = merge_weight(weight[part], blocks, scale)
    return merged


def _opened(path: Path) -> MergedFile:
    """A file with the shapes and dtypes of its tensors; their numbers are not read."""
    with open_safetensors(path) as file:
        shapes = {}
        for name in file.keys():  # noqa: SIM118 - it has no iterator
            piece = file.get_slice(name)
            dtype = dtype_of_safetensors(piece.get_dtype())
            if dtype is None:
                stored = piece.get_dtype()
                raise ValueError(f"{path}: {name}: expected a dtype of torch, got {stored}")
            shapes[name] = torch.empty(piece.get_shape(), dtype=dtype, device="meta")
        return MergedFile(path, shapes, file.metadata() or {})


def _chunks(file: MergedFile) -> Iterator[bytes]:
    """Yield the content of the merged file."""
    with open_safetensors(file.source) as opened:

        def numbers(name: str) -> torch.Tensor:
            if name in file.replaced:
                return file.replaced[name].to(file.tensors()[name].dtype)
            tensor = opened.get_tensor(name)
            return merged_tensor(tensor, file.layers[name]) if name in file.layers else tensor

        yield from safetensors_chunks(file.tensors(), file.metadata, numbers)


def _line(i: int, files: list[MergedFile]) -> str:
    file = files[i]
    changed = len(file.layers) + len(file.replaced)
    return f"{i + 1}/{len(files)} {file.source.name}: {changed} of {len(file.tensors())} tensors"


def _others(base: Path, files: list[MergedFile]) -> list[Path]:
    """The further files of the folder that belong to the merged checkpoint."""
    weights = {file.source.name for file in files}
    return [
        path
        for path in sorted(base.iterdir())
        if path.is_file()
        and path.name not in weights
        and path.suffix not in _WEIGHTS
        # an index of weights in another format
        and (path.name == INDEX or not path.name.endswith(".index.json"))
    ]


def _index(path: Path, files: list[MergedFile]) -> bytes:
    """The index, with the tensors that only the adapter has."""
    index = json.loads(path.read_bytes())
    for file in files:
        for name in file.replaced.keys() - file.shapes.keys():
            index["weight_map"][name] = file.source.name
    if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
        tensors = [tensor for file in files for tensor in file.tensors().values()]
        index["metadata"]["total_size"] = sum(t.numel() * t.element_size() for t in tensors)
    return json.dumps(index, indent=2, sort_keys=True).encode()


def _start(temporary: Path, state: dict) -> None:
    """Make the temporary folder, or go on in that of the same merge; another one is removed."""
    content = json.dumps(state, sort_keys=True).encode()
    found = temporary / STATE
    if not (found.is_file() and found.read_bytes() == content):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_whole(found, content)


def _stamp(path: Path) -> list:
    """A value that changes with the files of a checkpoint: names, sizes, times, small contents."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    stamp = []
    for file in files:
        facts = file.stat()
        digest = None
        if facts.st_size < 1 << 24:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
        stamp.append([file.name, facts.st_size, facts.st_mtime_ns, digest])
    return stamp
