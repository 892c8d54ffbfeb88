"""The documentation: its code runs, its commands and links exist, and its site builds."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import boft_ops

ROOT = Path(__file__).resolve().parents[2]
OUTER = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES = [*OUTER, *sorted((ROOT / "docs").rglob("*.md"))]

PUBLIC_MODEL = "HuggingFaceTB/SmolLM2-135M"  # has the Llama architecture

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def name(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    """Yield (first line, language, code) of every fenced block."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        yield text.count("\n", 0, match.start(2)), match[1], match[2]


def has_python(page):
    return any(language == "python" for _, language, _ in blocks(page))


def save_small_llama(folder):
    """Make a model in a folder that has the name of a public one, so that no network is needed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize("page", list(filter(has_python, PAGES)), ids=name)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """The blocks run in their order, and a block may use names that an earlier one defined."""
    monkeypatch.chdir(tmp_path)
    if PUBLIC_MODEL in page.read_text():
        save_small_llama(tmp_path / PUBLIC_MODEL)
    torch.manual_seed(0)
    torch.compiler.reset()  # other tests may have compiled the same functions up to the limit
    namespace = {"__name__": "snippet"}
    for line, language, code in blocks(page):
        if language == "python":
            # The empty lines make a traceback name the line of the page.
            exec(compile("\n" * line + code, name(page), "exec"), namespace)


def test_the_tests_find_every_code_block():
    languages = {"python", "bash", "json", ""}
    assert {"README.md", "docs/quickstart.md"} <= {name(page) for page in PAGES if has_python(page)}
    for page in PAGES:
        # Every fence is paired, and none is written in a form that the tests would miss.
        assert page.read_text().count("```") == 2 * len(list(blocks(page))), page
        for _, language, code in blocks(page):
            assert language in languages, page
            if language == "json":
                json.loads(code)


# --- Commands -------------------------------------------------------------------------------------


def commands(pattern):
    """Yield (page, match) of every command in a page."""
    for page in PAGES:
        for match in re.finditer(pattern, page.read_text(), re.MULTILINE):
            yield page, match


def test_every_make_target_that_is_named_exists():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # The command starts a line or a code span; "make" in a sentence does not count.
    named = {match[1] for _, match in commands(r"(?:^ *|`)make ([a-z][\w.-]*)")}
    assert {"demo", "test", "bench", "lint", "docs"} <= named
    for target in named:
        run = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, f"{target}: {run.stderr}"


def test_every_script_that_is_named_exists_and_has_the_options():
    calls = list(commands(r"python ((?:docs|bench|tests)/[\w/]+\.py)([^`\n#]*)"))
    assert len(calls) >= 5
    for page, match in calls:
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
def test_links_exist(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


@pytest.mark.slow
@pytest.mark.xdist_group("site")
def test_the_site_builds_without_a_warning(site):
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    for page in PAGES:  # every page is on the site, including those from outside of docs/
        source = name(page).removeprefix("docs/").replace("README.md", "index.md").lower()
        assert source.replace(".md", ".html") in {p.lower() for p in pages}, page
    # Files outside of docs/ that a page links to are on the site.
    assert (site / "files/bench/results/index.html").is_file()
    assert (site / "files/bench/results/amd-epyc-zen-4/auto.csv").is_file()
    citation = (site / "citation.html").read_text()
    assert "liu2024boft" in citation
    assert boft_ops.__version__ in citation
    text = (site / "api.html").read_text()
    assert "Raises:" in text
    for public in set(boft_ops.__all__) - {"__version__"}:
        # The pattern matches names in a module, not methods of a class.
        assert len(re.findall(rf'id="boft_ops\.[a-z_.]+\.{public}"', text)) == 1, public
    # Reading a page loads nothing from other servers.
    external = (
        re.compile(r'<(?:script|img)[^>]* src="https?:'),
        re.compile(r'<link[^>]* rel="(?:stylesheet|preconnect)" href="https?:'),
    )
    for path in site.rglob("*.html"):
        html = path.read_text()
        assert not any(pattern.search(html) for pattern in external), path
        assert "&lt;!--" not in html, path  # a comment that marks a table or a figure


def test_unlisted_pages_and_names_are_added_at_the_end():
    spec = importlib.util.spec_from_file_location("_site", ROOT / "docs" / "_site.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    paper = ["paper/tables.md"]
    config = types.SimpleNamespace(nav=[{"Start": "index.md"}, {"Paper": paper}, "quickstart.md"])
    nav = hooks.on_config(config).nav
    pages = {name(page).removeprefix("docs/") for page in PAGES if page not in OUTER}
    listed = [path for path in hooks.nav_paths(nav) if path != "index.md"]
    assert sorted(listed) == sorted(pages)  # each page appears once
    assert {page for page in pages if page.startswith("paper/")} == set(paper)
    assert nav[2] == "quickstart.md"
    everything = set(hooks.names_without_entry(""))
    names = {path.rpartition(".")[2] for path in everything}
    assert names == set(boft_ops.__all__) - {"__version__"}
    one = "boft_ops.ops.cayley.cayley"
    assert set(hooks.names_without_entry(f"::: {one}\n")) == everything - {one}


def test_files_stay_small():
    for folder, suffix, limit in (
        ("boft_ops", "py", 400),
        ("triton", "py", 400),
        ("bench", "py", 400),
        ("docs", "py", 400),
        ("csrc", "cpp", 400),
    ):
        for file in (ROOT / folder).rglob(f"*.{suffix}"):
            assert len(file.read_text().splitlines()) <= limit, file
