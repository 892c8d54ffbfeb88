"""The documentation: its code runs, its commands exist, its links lead somewhere, it builds."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import boft_ops

ROOT = Path(__file__).resolve().parents[2]
OUTER = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*OUTER, *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def name(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    """(line it starts on, language, code) of every fenced block."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        yield text.count("\n", 0, match.start(2)), match[1], match[2]


def has_python(page):
    return any(language == "python" for _, language, _ in blocks(page))


@pytest.mark.parametrize("page", list(filter(has_python, PAGES)), ids=name)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """From top to bottom, as a reader would: a block may use what an earlier one defined."""
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "snippet"}
    for line, language, code in blocks(page):
        if language == "python":
            # so many lines down that a traceback names the line of the page
            exec(compile("\n" * line + code, name(page), "exec"), space)


def test_there_is_python_and_nothing_escapes():
    languages = {"python", "bash", "json", ""}
    assert {"README.md", "docs/tutorial.md"} <= {name(page) for page in PAGES if has_python(page)}
    for page in PAGES:
        # every fence was paired, and none is written so that the tests would pass it over
        assert page.read_text().count("```") == 2 * len(list(blocks(page))), page
        for _, language, code in blocks(page):
            assert language in languages, page
            if language == "json":
                json.loads(code)


# --- Commands -------------------------------------------------------------------------------------


def commands(pattern):
    """(page, match) of a command, wherever a page names one."""
    for page in PAGES:
        for match in re.finditer(pattern, page.read_text(), re.MULTILINE):
            yield page, match


def test_every_make_target_that_is_named_exists():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # in a block or in code, not in a sentence that makes something
    named = {match[1] for _, match in commands(r"(?:^ *|`)make ([a-z][\w.-]*)")}
    assert {"demo", "test", "bench", "lint", "docs"} <= named
    for target in named:
        run = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, f"{target}: {run.stderr}"


def test_every_script_that_is_named_exists_and_has_the_options():
    found = list(commands(r"python ((?:docs|bench|tests)/[\w/]+\.py)([^`\n#]*)"))
    assert len(found) >= 5
    for page, match in found:
        script = ROOT / match[1]
        assert script.is_file(), f"{name(page)}: {match[1]}"
        sources = "".join(file.read_text() for file in script.parent.glob("*.py"))
        for option in re.findall(r"--[a-z][\w-]*", match[2]):
            assert f'"{option}"' in sources, f"{name(page)}: {match[0]}"


def test_every_subcommand_that_is_named_exists():
    run = subprocess.run(
        [sys.executable, "-m", "boft_ops", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    named = {match[1] for _, match in commands(r"python -m boft_ops ([a-z]\w*)")}
    assert "vendor" in named
    assert all(command in run.stdout for command in named), named


# --- Links and the site ---------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    site = tmp_path / "site"
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    for page in PAGES:  # every page is on it, the repository's own too
        source = name(page).removeprefix("docs/").replace("README.md", "index.md").lower()
        assert source.replace(".md", ".html") in {p.lower() for p in pages}, page
    # what is linked to outside of docs/ came along
    assert (site / "files/bench/results/index.html").is_file()
    assert (site / "files/bench/results/cpu/auto.csv").is_file()
    text = (site / "api.html").read_text()
    assert "Raises:" in text
    for public in set(boft_ops.__all__) - {"__version__"}:
        # in a module, not the method of a class
        assert len(re.findall(rf'id="boft_ops\.[a-z_.]+\.{public}"', text)) == 1, public
    # nothing is loaded from elsewhere when a page is read
    elsewhere = (
        re.compile(r'<(?:script|img)[^>]* src="https?:'),
        re.compile(r'<link[^>]* rel="(?:stylesheet|preconnect)" href="https?:'),
    )
    for path in site.rglob("*.html"):
        html = path.read_text()
        assert not any(pattern.search(html) for pattern in elsewhere), path


def test_what_has_no_place_on_the_site_comes_to_an_end():
    spec = importlib.util.spec_from_file_location("_site", ROOT / "docs" / "_site.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    paper = ["paper/tables.md"]
    config = types.SimpleNamespace(nav=[{"Start": "index.md"}, {"Paper": paper}, "tutorial.md"])
    nav = hooks.on_config(config).nav
    pages = {name(page).removeprefix("docs/") for page in PAGES if page not in OUTER}
    listed = [path for path in hooks._paths(nav) if path != "index.md"]
    assert sorted(listed) == sorted(pages)  # each once
    assert {page for page in pages if page.startswith("paper/")} == set(paper)
    assert nav[2] == "tutorial.md"
    everything = set(hooks._not_placed(""))
    names = {path.rpartition(".")[2] for path in everything}
    assert names == set(boft_ops.__all__) - {"__version__"}
    one = "boft_ops.ops.cayley.cayley"
    assert set(hooks._not_placed(f"::: {one}\n")) == everything - {one}


def test_files_stay_small():
    for folder, suffix, limit in (
        ("boft_ops", "py", 400),
        ("triton", "py", 300),
        ("bench", "py", 300),
        ("docs", "py", 300),
        ("csrc", "cpp", 400),
    ):
        for file in (ROOT / folder).rglob(f"*.{suffix}"):
            assert len(file.read_text().splitlines()) <= limit, file
