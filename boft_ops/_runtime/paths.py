"""Paths of the kernel sources: inside an installed or vendored package, beside it in a checkout.

The repository keeps its Triton kernels in a top-level folder `triton/`. Its modules are always
imported as `<package>.triton_kernels`, never as `triton`, because that name belongs to the
compiler.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the package
ROOT = HERE.parent


def in_checkout() -> bool:
    """Return True if this package is the source tree itself, also when installed as editable."""
    return (ROOT / "setup.py").is_file() and (ROOT / "csrc" / "binding.cpp").is_file()


def csrc() -> Path | None:
    """Find the folder of C++ sources; None in a copy that lacks them."""
    for folder in (HERE / "csrc", ROOT / "csrc" if in_checkout() else None):
        if folder and (folder / "binding.cpp").is_file():
            return folder
    return None


def triton_kernels() -> Path | None:
    """Find the folder of Triton kernels; None in a copy that lacks them."""
    for folder in (HERE / "triton_kernels", ROOT / "triton" if in_checkout() else None):
        if folder and folder.is_dir():
            return folder
    return None


def license_file() -> Path | None:
    """Find the license text, which belongs in every copy of the package; None if it is missing."""
    for file in (HERE / "LICENSE", ROOT / "LICENSE" if in_checkout() else None):
        if file and file.is_file():
            return file
    return None


def nearest(path: Path) -> Path:
    """Find the path itself or else its nearest existing parent.

    The result is a folder if the path can be made a folder.
    """
    return next((p for p in (path, *path.absolute().parents) if os.path.exists(p)), path)


def mount_triton(package: str) -> None:
    """Make the folder triton/ of a checkout importable as `<package>.triton_kernels`.

    In other copies triton_kernels/ is an ordinary folder inside the package, and this function does
    nothing.
    """
    name = f"{package}.triton_kernels"
    folder = triton_kernels()
    if name in sys.modules or folder is None or folder.parent == HERE:
        return
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[name] = importlib.util.module_from_spec(spec)


def hide_phantom_triton() -> None:
    """Keep torch from mistaking the checkout's folder triton/ for an installed Triton.

    If Triton is not installed and Python starts in the repository root, `import triton` finds that
    folder as an empty namespace package. torch then takes Triton for installed, and every
    torch.compile fails with "module 'triton' has no attribute 'language'".
    """
    try:
        spec = importlib.util.find_spec("triton")
    except (ImportError, ValueError):
        return
    if spec is None or spec.origin is not None or not in_checkout():
        return
    folders = {Path(p).resolve() for p in spec.submodule_search_locations or ()}
    if folders != {ROOT / "triton"}:
        return
    sys.modules["triton"] = None  # from now on `import triton` raises ImportError, as it should
    # torch caches its answers to "is Triton installed?"; make it ask again.
    torch_triton = sys.modules.get("torch.utils._triton")
    for function in vars(torch_triton).values() if torch_triton else ():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
