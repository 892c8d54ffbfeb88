"""Hook of the MkDocs site: formulas become MathML, which browsers draw without any script.

Pages write formulas in LaTeX, ``$...$`` within a line and ``$$...$$`` on lines of their own, as
GitHub shows them too.
"""

from __future__ import annotations

import re
from html import unescape

from latex2mathml.converter import convert

# The element that pymdownx.arithmatex makes of a formula, with the LaTeX in it.
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(html: str, **_) -> str:
    """Replace the formulas of a page by MathML."""
    return FORMULA.sub(lambda match: mathml(unescape(match[2]), block=match[1] == "div"), html)


def mathml(latex: str, block: bool) -> str:
    """Translate a formula.

    Raises:
        ValueError: the formula has a command or an alignment that the translation does not know.
    """
    result = convert(latex.strip(), display="block" if block else "inline")
    shown = unescape(re.sub(r"<[^>]*>", "", result))
    if "\\" in shown or "&" in shown:
        raise ValueError(f"formula: expected LaTeX that latex2mathml translates, got {latex!r}")
    return f'<div class="formula">{result}</div>' if block else result
