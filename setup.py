"""Packages, their folders, and the build of the native library; pyproject.toml has the metadata.

BOFT_OPS_SKIP_EXT=1 leaves the library out. BOFT_OPS_FORCE_EXT=1 makes its absence an error.
docs/env.md lists all variables.
"""

import importlib.util
import shutil
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "boft_ops"
CSRC = ROOT / "csrc"

# The name `triton` belongs to the compiler, so the folder triton/ becomes a subpackage of ours.
# csrc/ is shipped too, so that an installed or vendored copy can compile its library.
FOLDERS = {"boft_ops": "boft_ops", "boft_ops.triton_kernels": "triton", "boft_ops.csrc": "csrc"}


def _load_build_module():
    # The module is loaded by its path, because importing the package would need torch.
    spec = importlib.util.spec_from_file_location(
        "_boft_ops_build", PACKAGE / "_runtime" / "build.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_build_module()


def log(message):
    print(f"boft_ops: {message}", file=sys.stderr, flush=True)


def target_site_packages():
    """List the site-packages folders of the environment that pip installs into.

    pip's isolated build runs the interpreter of that environment, but hides these folders. Other
    front ends use an interpreter of their own; with them, use --no-build-isolation.
    """
    prefixes = [sys.prefix]
    config = Path(sys.prefix) / "pyvenv.cfg"
    if config.is_file() and "include-system-site-packages = true" in config.read_text():
        prefixes.append(sys.base_prefix)
    return [sysconfig.get_path("purelib"), *site.getsitepackages(prefixes)]


class Native:
    """State of the native library in this run of setup.py.

    Attributes:
        torch: the torch to build against, or None.
        missing: the reason why there is no library, or None.
        built: the folder of the library if this run has built it, or None.
    """

    def __init__(self):
        build.check_settings()
        self.torch, self.missing, self.built = None, "BOFT_OPS_SKIP_EXT=1", None
        if not build.flag("BOFT_OPS_SKIP_EXT"):
            self.torch = build.find_torch(target_site_packages())
            self.missing = build.obstacle(CSRC, self.torch)
        if self.missing:
            self.give_up(self.missing)

    def give_up(self, why):
        """Go on without the library and remember the reason; exit if the library is required."""
        self.missing = why
        if build.flag("BOFT_OPS_FORCE_EXT"):
            raise SystemExit(f"boft_ops: BOFT_OPS_FORCE_EXT=1, but: {why}")
        log(f"NO native library: {why}. Installing the pure package.")


class BuildPy(build_py):
    """Copy the Python files, add the license, and record the reason if there is no library."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copy(ROOT / "LICENSE", Path(self.build_lib) / "boft_ops" / "LICENSE")
        if native.missing:
            home = PACKAGE if self.editable_mode else Path(self.build_lib) / "boft_ops"
            build.note_absence(home, native.missing)


class BuildNative(build_ext):
    """Compile the library. A failure leaves a pure package that records the reason."""

    def home(self):
        """Folder that the library goes into."""
        return PACKAGE if self.inplace or self.editable_mode else Path(self.build_lib) / "boft_ops"

    def run(self):
        if native.missing:
            build.note_absence(self.home(), native.missing)
            return
        if native.built == self.home():  # bdist_wheel runs this command a second time
            return
        log(f"building the native library against torch {native.torch.version}")
        try:
            # pip deletes self.build_temp, but the object files should serve the next build.
            work, out = ROOT / "build" / "native", self.home() / build.LIB
            plan = build.compile_library(CSRC, native.torch, work, out, self.verbose > 1)
            native.built = self.home()
            log(f"built the native library for {plan.why}")
        except build.SettingError as error:
            raise SystemExit(f"boft_ops: {error}") from None
        except build.BuildError as error:
            build.note_absence(self.home(), str(error))
            native.give_up(str(error))
            # Otherwise the wheel would put the package under platlib.
            self.distribution.ext_modules.clear()

    def get_outputs(self):
        return (
            [] if native.missing else [str(self.home() / name) for name in (build.LIB, build.INFO)]
        )

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []  # MANIFEST.in lists them


class Wheel(bdist_wheel):
    """Make one wheel for every CPython, because the library is not a Python extension."""

    def run(self):
        # A file that was deleted from the repository would stay in the build folder and be shipped.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        # The library is built first, because the tag of the wheel depends on its success.
        if self.distribution.has_ext_modules():
            self.run_command("build_ext")
        self.root_is_pure = bool(native.missing)
        super().run()

    def get_tag(self):
        return ("py3", "none", "any" if native.missing else super().get_tag()[2])


# Metadata and sdists need neither torch nor a compiler.
building = not {"sdist", "egg_info", "dist_info"} & set(sys.argv[1:2])
try:
    native = Native() if building else None
except build.SettingError as error:
    raise SystemExit(f"boft_ops: {error}") from None
options = {}
if native:
    options["cmdclass"] = {"build_py": BuildPy, "build_ext": BuildNative, "bdist_wheel": Wheel}
    options["ext_modules"] = [] if native.missing else [Extension("boft_ops.libboft_native", [])]

setup(
    packages=[name for name, folder in FOLDERS.items() if (ROOT / folder).is_dir()]
    + find_packages(str(ROOT), include=["boft_ops.*"]),
    package_dir=FOLDERS,
    package_data={
        "boft_ops": ["py.typed"],
        "boft_ops.csrc": ["**/*.h", "**/*.cpp", "**/*.cu", "**/*.cuh"],
    },
    include_package_data=False,
    zip_safe=False,
    **options,
)
