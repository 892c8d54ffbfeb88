"""The material of the site: formulas, pictures and the lines of its code."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^\n|\A)((?:    .*\n)+)", re.MULTILINE)  # after an empty line


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    result = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(result)
    return result


def test_formulas_become_mathml():
    pytest.importorskip("latex2mathml", reason="latex2mathml of the extra docs is not installed")
    hook = module(ROOT / "docs" / "_math.py")
    page = '<p>R is <span class="arithmatex">R^\\top R = I</span>, if i &lt; j.</p>'
    html = hook.on_page_content(page)
    assert html.startswith("<p>R is <math ")
    assert html.endswith("</math>, if i &lt; j.</p>")
    assert "<msup>" in html
    block = hook.on_page_content('<div class="arithmatex">\ni &lt; j\n</div>')
    assert 'display="block"' in block
    assert re.search("<mo>(&lt;|&#x0003C;)</mo>", block)
    with pytest.raises(ValueError, match=r"formula: expected LaTeX .* got '\\\\nosuch'"):
        hook.mathml(r"\nosuch", block=False)
    with pytest.raises(ValueError, match="formula: expected"):  # no alignment
        hook.mathml(r"\begin{aligned} x &= 1 \end{aligned}", block=True)


def test_the_picture_of_the_butterfly_is_what_the_operators_do():
    script = module(ROOT / "docs" / "images" / "butterfly.py")
    assert script.IMAGE.read_text(encoding="utf-8") == script.draw()
    for m, b in script.BUTTERFLIES:
        product = None
        for pattern in script.patterns(m, b):
            assert (pattern.sum(1) == b).all()  # each factor mixes each feature with b - 1 others
            product = pattern if product is None else (product.int() @ pattern.int()) > 0
        assert product.all()  # all factors mix everything


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_is_at_most_80_columns_wide(page):
    """The site's column shows no more, and a phone scrolls less."""
    text = page.read_text()
    code = FENCE.findall(text) + [
        re.sub("^    ", "", block, flags=re.MULTILINE)
        for block in INDENTED.findall(FENCE.sub("", text))
    ]
    assert [line for block in code for line in block.splitlines() if len(line) > 80] == []


def test_the_width_of_code_is_seen():
    text = "# A\n\n    indented\n\n```python\nfenced\n```\n"
    assert FENCE.findall(text) == ["fenced\n"]
    assert INDENTED.findall(text) == ["    indented\n"]


# --- The reference of the API ---------------------------------------------------------------------


def public(name):
    """The public functions and classes of a module."""
    module = importlib.import_module(name)
    names = getattr(module, "__all__", None)
    if names is None:
        names = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == name]
    return {n for n in names if not n.startswith("_")} - {"__version__"}


@pytest.mark.parametrize("name", ["boft_ops", "boft_ops.distributed", "boft_ops.interop.peft"])
def test_every_public_name_has_an_entry_of_its_own(name):
    """In api.md itself, in its place, beside those that the site would add at the end."""
    entries = re.findall(r"^::: [\w.]+\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert len(entries) == len(set(entries))
    assert public(name)
    assert public(name) <= set(entries)
