"""The material of the site: formulas, pictures and the lines of its code."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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
