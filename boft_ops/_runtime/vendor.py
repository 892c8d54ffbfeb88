"""Copies this package, sources and licence included, into another code base: `vendor DEST`.

The copy works under any dotted name, beside an installed boft_ops in the same process: every import
inside it is relative and its operators get a namespace of their own from its name.
"""

import keyword
import shutil
import tempfile
from pathlib import Path

from . import build, native, paths

_LEFT_OUT = ("__pycache__", "*.py[cod]", "*.so", build.INFO)


def vendor(dest: Path, *, force: bool = False, with_native: bool = False) -> Path:
    """Make `dest` a self-contained copy of this package; `force` replaces an earlier copy there."""
    dest = Path(dest).expanduser().absolute()
    name = dest.name
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"DEST: expected a path that ends in a module name, got {str(dest)!r}")
    _check_place(dest, force)
    parts = {"csrc": paths.csrc(), "triton_kernels": paths.triton_kernels()}
    missing = [part for part, folder in parts.items() if folder is None]
    if missing:
        raise ValueError(f"this copy has no {' and no '.join(missing)}: vendor from a complete one")
    if with_native and native.library is None:
        raise ValueError(f"--with-native: there is no library to copy ({native.status})")

    dest.parent.mkdir(parents=True, exist_ok=True)
    # Made aside and moved, so that a failure on the way leaves an earlier copy as it was.
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{name}-") as aside:
        new = Path(aside) / "new"
        ignore = shutil.ignore_patterns(*_LEFT_OUT, *parts)
        shutil.copytree(paths.HERE, new, ignore=ignore)
        for part, folder in parts.items():
            shutil.copytree(folder, new / part, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        if license_file := paths.license_file():
            shutil.copy(license_file, new / "LICENSE")
        if with_native:
            for file in (build.LIB, build.INFO):
                shutil.copy(native.library.parent / file, new / file)
        else:
            build.note_absence(new, "vendored without the native library")
        if dest.exists():
            dest.rename(Path(aside) / "old")
        new.rename(dest)
    return dest


def _check_place(dest: Path, force: bool) -> None:
    here, real = paths.HERE, dest.resolve()
    if real == here or here in real.parents:
        raise ValueError(f"DEST: expected a place outside the package {here}, got {dest}")
    if real in here.parents:
        raise ValueError(f"DEST: {dest} holds the package that is to be copied")
    if dest.is_symlink() or (dest.exists() and not dest.is_dir()):
        raise ValueError(f"DEST: expected a new folder, but {dest} is a file or a link")
    if not dest.is_dir() or not any(dest.iterdir()):
        return
    if not force:
        raise ValueError(f"DEST: {dest} is not empty (--force replaces an earlier copy)")
    # Never delete what this command did not make.
    if not all((dest / "_runtime" / file).is_file() for file in ("vendor.py", "namespace.py")):
        raise ValueError(f"DEST: {dest} is not an earlier copy of this package; remove it yourself")
