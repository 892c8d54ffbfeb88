"""Where the kernel sources lie: inside an installed or vendored package, beside it in a checkout.

The repository keeps its Triton kernels in a top-level folder `triton/`. Its modules are always
imported as `<package>.triton_kernels`, never as `triton`: that stays the compiler's name.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the package
ROOT = HERE.parent


def in_checkout() -> bool:
    """Whether this package is the source tree itself (also when installed as editable)."""
    return (ROOT / "setup.py").is_file() and (ROOT / "csrc" / "binding.cpp").is_file()


def csrc() -> Path | None:
    """The folder of C++ sources, or None in a copy that was stripped of them."""
    for folder in (HERE / "csrc", ROOT / "csrc" if in_checkout() else None):
        if folder and (folder / "binding.cpp").is_file():
            return folder
    return None


def triton_kernels() -> Path | None:
    """The folder of Triton kernels, or None in a copy that was stripped of them."""
    for folder in (HERE / "triton_kernels", ROOT / "triton" if in_checkout() else None):
        if folder and folder.is_dir():
            return folder
    return None


def license_file() -> Path | None:
    """The licence text that has to travel with every copy."""
    for file in (HERE / "LICENSE", ROOT / "LICENSE" if in_checkout() else None):
        if file and file.is_file():
            return file
    return None


def nearest(path: Path) -> Path:
    """The path, or what is there of the way to it: a folder, if the path can be made one."""
    return next((p for p in (path, *path.absolute().parents) if os.path.exists(p)), path)


def mount_triton(package: str) -> None:
    """In a checkout, make `<package>.triton_kernels` the folder triton/, installed or not.

    Elsewhere triton_kernels/ is an ordinary folder inside the package and nothing is needed.
    """
    name = f"{package}.triton_kernels"
    folder = triton_kernels()
    if name in sys.modules or folder is None or folder.parent == HERE:
        return
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[name] = importlib.util.module_from_spec(spec)


def hide_phantom_triton() -> None:
    """Without Triton, keep the checkout's triton/ folder from passing for it.

    Python started in the repository root then finds an empty namespace package `triton`, torch
    believes it, and every torch.compile dies: "module 'triton' has no attribute 'language'".
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
    torch_answers = sys.modules.get("torch.utils._triton")
    for function in vars(torch_answers).values() if torch_answers else ():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
