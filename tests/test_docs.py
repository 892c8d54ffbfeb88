"""The README's commands exist, and every Python snippet in the documentation runs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


SIZES = [("boft_ops", "py", 300), ("triton", "py", 300), ("bench", "py", 300), ("csrc", "cpp", 400)]


def snippets():
    for page in PAGES:
        for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
            yield pytest.param(code, id=f"{page.stem}-{i}")


@pytest.mark.parametrize("code", snippets())
def test_snippet_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


def test_there_are_snippets():
    assert len(list(snippets())) >= 5


def test_every_make_target_named_in_the_readme_exists():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    targets = set(re.findall(r"\bmake (\w+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test", "bench", "lint"} <= targets
    for target in targets:
        run = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, f"{target}: {run.stderr}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_files_stay_small():
    for folder, suffix, limit in (
        ("boft_ops", "py", 300),
        ("triton", "py", 300),
        ("csrc", "cpp", 400),
    ):
        for file in (ROOT / folder).rglob(f"*.{suffix}"):
            assert len(file.read_text().splitlines()) <= limit, file
