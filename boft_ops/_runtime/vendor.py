"""The command `vendor DEST`: copy this package, with sources and license, into another code base.

The copy works under any dotted name and beside an installed boft_ops in the same process. This is
possible because every import inside the package is relative, and because the namespace of its
operators comes from the name that it is imported under.
"""

import keyword
import shutil
import tempfile
from pathlib import Path

from . import build, native, paths

_LEFT_OUT = ("__pycache__", "*.py[cod]", "*.so", build.INFO)


def vendor(dest: Path, *, force: bool = False, with_native: bool = False) -> Path:
    """Make a self-contained copy of this package.

    Args:
        dest: folder of the copy. Its last part must be a valid module name.
        force: replace an earlier copy at ``dest``. The default is False.
        with_native: copy the compiled library too. The default is False.

    Returns:
        The absolute path of the copy.

    Raises:
        ValueError: ``dest`` is no valid place for a copy, this package lacks kernel sources, or
            there is no library to copy.
    """
    dest = Path(dest).expanduser().absolute()
    name = dest.name
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"DEST: expected a path that ends in a module name, got {str(dest)!r}")
    _check_destination(dest, force)
    parts = {"csrc": paths.csrc(), "triton_kernels": paths.triton_kernels()}
    missing = [part for part, folder in parts.items() if folder is None]
    if missing:
        raise ValueError(f"this copy has no {' and no '.join(missing)}: vendor from a complete one")
    if with_native and native.library is None:
        raise ValueError(f"--with-native: there is no library to copy ({native.status})")

    dest.parent.mkdir(parents=True, exist_ok=True)
    # The copy is made in a temporary folder and then moved, so that a failure leaves an earlier
    # copy as it was.
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


def _check_destination(dest: Path, force: bool) -> None:
    """Raise ValueError if a copy at ``dest`` would overwrite anything but an earlier copy."""
    package, real = paths.HERE, dest.resolve()
    if real == package or package in real.parents:
        raise ValueError(f"DEST: expected a folder outside the package {package}, got {dest}")
    if real in package.parents:
        raise ValueError(f"DEST: {dest} contains the package to be copied")
    if dest.is_symlink() or (dest.exists() and not dest.is_dir()):
        raise ValueError(f"DEST: expected a new folder, but {dest} is a file or a link")
    if not dest.is_dir() or not any(dest.iterdir()):
        return
    if not force:
        raise ValueError(f"DEST: {dest} is not empty (--force replaces an earlier copy)")
    # The command never deletes a folder that it did not make.
    if not all((dest / "_runtime" / file).is_file() for file in ("vendor.py", "namespace.py")):
        raise ValueError(f"DEST: {dest} is not an earlier copy of this package; remove it yourself")
