"""The files of a release: what describes it agrees, and `make dist` makes and checks it."""

import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import boft_ops

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
VERSIONING = (ROOT / "docs" / "versioning.md").read_text()


def test_the_version_is_the_same_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changelog, re.M)[1] == boft_ops.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == boft_ops.__version__


def test_the_citation_is_of_the_paper():
    """CITATION.cff has what version 1.2.0 of its format requires, and the README's paper."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    paper = citation["preferred-citation"]
    assert paper.keys() >= {"type", "title", "authors"}
    authors = [author["family-names"] for author in paper["authors"]]
    assert len(authors) == 14
    assert (authors[0], authors[-1]) == ("Liu", "Schölkopf")
    assert paper["url"] in (ROOT / "README.md").read_text()


def test_the_page_promises_what_the_metadata_allows():
    for row, pattern in {
        "Python": r'requires-python = ">=([\d.]+)"',
        "PyTorch": r'"torch>=([\d.]+)"',
        "Triton": r'"triton>=([\d.]+);',
        "PEFT": r'^  "peft>=([\d.]+)",$',
    }.items():
        oldest = re.search(pattern, PYPROJECT, re.M)[1]
        assert re.search(rf"^\| {row} \| {re.escape(oldest)} ", VERSIONING, re.M), row
    newest = re.findall(r"Python :: (3\.\d+)", PYPROJECT)[-1]
    assert f"to {newest} |" in VERSIONING
    assert "[project.urls]" in PYPROJECT


@pytest.mark.exhaustive
def test_make_dist(run, new_tree, tmp_path, needs_compiler):
    """`make dist` makes three files that auditwheel and twine accept; the wheel has its library."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    out, stamps = tmp_path / "dist", tmp_path / "stamps"
    variables = [f"VENV={sys.prefix}", f"PY={sys.executable}", f"STAMPS={stamps}", f"DIST={out}"]
    variables.append("DIST_CUDA=0")  # nvcc takes ten minutes for what other tests compile in parts
    # -o: what the target would install is installed here already
    made = run.command("make", "dist", *variables, "-o", stamps / "dist", cwd=new_tree())
    assert made.stdout.count("PASSED") == 3, made.stdout
    start = f"boft_ops-{boft_ops.__version__}"
    names = [file.name for file in out.iterdir()]
    (native,) = (name for name in names if "-manylinux_2_28_" in name)
    assert sorted(names) == [f"{start}-py3-none-any.whl", native, f"{start}.tar.gz"]
    site = tmp_path / "site"
    with zipfile.ZipFile(out / native) as wheel:
        wheel.extractall(site)
    code = "from boft_ops._runtime import native; print(native.status, native.library)"
    assert f"{site}/boft_ops/libboft_native.so" in run("-c", code, path=[site]).stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize("checker", ["mypy", "pyright", "python"])
def test_a_users_script(checker, run, installed, tmp_path):
    """A program that uses the public names passes strict type checks, and runs."""
    script = shutil.copy(ROOT / "tests" / "data" / "user_script.py", tmp_path)
    arguments = {
        "mypy": ["-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", script],
        "pyright": ["-m", "pyright", "--pythonpath", sys.executable, script],
        "python": [script],
    }[checker]
    env = {"MYPYPATH": str(installed)} if checker == "mypy" else {}
    run(*arguments, path=[installed], cwd=tmp_path, **env)
