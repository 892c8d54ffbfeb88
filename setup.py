"""Maps folders to packages and builds the native library; pyproject.toml holds the metadata.

BOFT_OPS_SKIP_EXT=1 leaves the library out, BOFT_OPS_FORCE_EXT=1 makes its absence an error.
All variables: docs/env.md.
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

# `triton` is the compiler's name: the folder of that name is a package under ours. csrc/ travels
# along, so that an installed or vendored copy can be compiled where it is.
FOLDERS = {"boft_ops": "boft_ops", "boft_ops.triton_kernels": "triton", "boft_ops.csrc": "csrc"}


def _build_module():
    # By its path: importing the package would need torch.
    spec = importlib.util.spec_from_file_location(
        "_boft_ops_build", PACKAGE / "_runtime" / "build.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


B = _build_module()


def say(message):
    print(f"boft_ops: {message}", file=sys.stderr, flush=True)


def target_site_packages():
    """Under pip's build isolation: the site-packages of the environment that is installed into.

    pip's isolated build runs that environment's own interpreter with these folders hidden. (Other
    front ends use an interpreter of their own; there --no-build-isolation is the way.)
    """
    prefixes = [sys.prefix]
    config = Path(sys.prefix) / "pyvenv.cfg"
    if config.is_file() and "include-system-site-packages = true" in config.read_text():
        prefixes.append(sys.base_prefix)
    return [sysconfig.get_path("purelib"), *site.getsitepackages(prefixes)]


class Native:
    """What becomes of the native library in this run of setup.py."""

    def __init__(self):
        B.check_settings()
        self.torch, self.missing, self.built = None, "BOFT_OPS_SKIP_EXT=1", None
        if not B.flag("BOFT_OPS_SKIP_EXT"):
            self.torch = B.find_torch(target_site_packages())
            self.missing = B.obstacle(CSRC, self.torch)
        if self.missing:
            self.give_up(self.missing)

    def give_up(self, why):
        """Go on without the library and remember why, unless it was demanded."""
        self.missing = why
        if B.flag("BOFT_OPS_FORCE_EXT"):
            raise SystemExit(f"boft_ops: BOFT_OPS_FORCE_EXT=1, but: {why}")
        say(f"NO native library: {why}. Installing the pure package.")


class BuildPy(build_py):
    """Adds the licence to the package itself, and the reason where there is no library."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copy(ROOT / "LICENSE", Path(self.build_lib) / "boft_ops" / "LICENSE")
        if native.missing:
            home = PACKAGE if self.editable_mode else Path(self.build_lib) / "boft_ops"
            B.note_absence(home, native.missing)


class BuildNative(build_ext):
    """Compiles the one library. A failure leaves a pure package with the reason on record."""

    def home(self):
        return PACKAGE if self.inplace or self.editable_mode else Path(self.build_lib) / "boft_ops"

    def run(self):
        if native.missing:
            B.note_absence(self.home(), native.missing)
            return
        if native.built == self.home():  # bdist_wheel resets this command and runs it again
            return
        say(f"building the native library against torch {native.torch.version}")
        try:
            # Not self.build_temp, which pip throws away: the objects serve the next build.
            work, out = ROOT / "build" / "native", self.home() / B.LIB
            plan = B.compile_library(CSRC, native.torch, work, out, self.verbose > 1)
            native.built = self.home()
            say(f"built the native library for {plan.why}")
        except B.SettingError as error:
            raise SystemExit(f"boft_ops: {error}") from None
        except B.BuildError as error:
            B.note_absence(self.home(), str(error))
            native.give_up(str(error))
            self.distribution.ext_modules.clear()  # or the wheel files the package under platlib

    def get_outputs(self):
        return [] if native.missing else [str(self.home() / name) for name in (B.LIB, B.INFO)]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []  # MANIFEST.in lists them


class Wheel(bdist_wheel):
    """One wheel for every CPython: the library is no Python extension."""

    def run(self):
        # Afresh: a file that left the repository would stay in the build folder and be shipped.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        # The library first: only then is it known whether there is one to tag.
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
except B.SettingError as error:
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
        "boft_ops": ["py.typed", "configs/*.json"],
        "boft_ops.csrc": ["**/*.h", "**/*.cpp", "**/*.cu", "**/*.cuh"],
    },
    include_package_data=False,
    zip_safe=False,
    **options,
)
