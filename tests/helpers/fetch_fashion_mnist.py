"""Fetch Fashion-MNIST's test set from Debian's package into data/fashion-mnist, without root.

One test of tests/nn/test_real_models.py uses it and is skipped without it. Only a Debian mirror
provides the package, so a failed download is not an error.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")  # the folder of the installed package
FOLDER = Path(__file__).resolve().parents[2] / "data" / "fashion-mnist"
FILES = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")


def find():
    """Return the folder that contains the files, or None."""
    for folder in (FOLDER, INSTALLED):
        if all((folder / name).is_file() for name in FILES):
            return folder
    return None


def fetch():
    """Download the package and copy the files from it."""
    with tempfile.TemporaryDirectory() as scratch:
        run = {"cwd": scratch, "check": True, "stdout": subprocess.DEVNULL, "timeout": 120}
        subprocess.run(["apt-get", "download", PACKAGE], stderr=subprocess.DEVNULL, **run)
        (archive,) = Path(scratch).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive.name, "unpacked"], **run)
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            source = Path(scratch) / "unpacked" / INSTALLED.relative_to("/") / name
            shutil.copy(source, FOLDER / name)


if __name__ == "__main__":
    if find() is None:
        try:
            fetch()
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            print(f"no Fashion-MNIST, one test will be skipped: {error}", file=sys.stderr)
