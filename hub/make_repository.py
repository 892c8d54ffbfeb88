"""Make a repository that `kernels.get_local_kernel` loads, ready to be uploaded: `make hub`.

python hub/make_repository.py FOLDER    copies of the package, metadata, build.toml and a card
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import sys
from pathlib import Path

from boft_ops._runtime import vendor
from boft_ops._version import __version__

HERE = Path(__file__).resolve().parent
NAME = "boft-ops"
VERSION = 1  # of the kernel, which users pin; it rises when a call of an earlier version would fail
STABLE_ABI = "210"  # the oldest torch that the library runs with: 2.10
BACKENDS = ("cpu", "cuda", "rocm")


def native_variant() -> str:
    """Name of the variant with the C++ kernels that were compiled on this machine."""
    return f"torch-stable-abi{STABLE_ABI}-cpu-{platform.machine()}-linux"


def make(folder: Path) -> None:
    """Write the repository.

    Args:
        folder: a new or empty folder.

    Raises:
        ValueError: the folder is not empty, or this package has no native library to copy.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"FOLDER: expected a new or empty folder, got {folder}")
    _add_variant(folder / "build" / native_variant(), "cpu", with_native=True)
    for backend in BACKENDS:
        _add_variant(folder / "build" / f"torch-{backend}", backend)
    general = {"edition": 5, "name": NAME, "version": VERSION, "license": "MIT"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in general.items()]
    lines = ["[general]", *lines, f"backends = {json.dumps(BACKENDS)}", "", "[torch]", ""]
    (folder / "build.toml").write_text("\n".join(lines))
    card = (HERE / "card.md").read_text(encoding="utf-8")
    card = card.replace("{version}", str(VERSION)).replace("{native}", native_variant())
    (folder / "README.md").write_text(card, encoding="utf-8")
    shutil.copy(HERE.parent / "LICENSE", folder / "LICENSE")


def _add_variant(target: Path, backend: str, *, with_native: bool = False) -> None:
    """Add a copy of the package with its metadata, and with the compiled library if asked."""
    # A variant's name is no module's name, which vendor() demands.
    copy = vendor.vendor(target.with_name("copy"), with_native=with_native).rename(target)
    shutil.copy(HERE / "layers.py", copy)
    with (copy / "__init__.py").open("a", encoding="utf-8") as init:
        init.write("\nfrom . import layers  # noqa: E402\n")
    # The package is imported under this name, and its operators are registered under it: the hash
    # keeps two versions in one process apart.
    content = hashlib.sha256()
    for file in sorted(path for path in copy.rglob("*") if path.is_file()):
        content.update(file.relative_to(copy).as_posix().encode() + b"\0" + file.read_bytes())
    metadata = {
        "id": f"_boft_ops_{backend}_{content.hexdigest()[:12]}",
        "name": NAME,
        "version": VERSION,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": backend},
    }
    (copy / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the repository, a new folder")
    folder = parser.parse_args(argv).folder
    try:
        make(folder)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    print(f"made {folder} (boft_ops {__version__}, kernel version {VERSION})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
