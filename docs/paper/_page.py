"""Tables of the pages in this folder. Each is written by the script whose data it shows."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[str]], n_words: int = 1) -> list[str]:
    """Make a Markdown table. The first ``n_words`` columns are words, the others numbers."""
    line = ["---"] * n_words + ["---:"] * (len(head) - n_words)
    return ["| " + " | ".join(cells) + " |" for cells in (head, line, *rows)]


def fill(page: Path, name: str, lines: Sequence[str]) -> None:
    """Put lines between the comments <!-- name --> and <!-- /name --> of a page.

    Raises:
        ValueError: the page does not have these two comments.
    """
    before, start, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not start or not end:
        raise ValueError(f"{page}: expected <!-- {name} --> and <!-- /{name} -->")
    page.write_text(before + start + "\n".join(lines) + "\n" + end + after)
