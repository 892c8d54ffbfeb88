"""Hook of the MkDocs site: the page of citations, made from CITATION.cff."""

from __future__ import annotations

import textwrap
from pathlib import Path

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

SOURCE = Path(__file__).resolve().parent.parent / "CITATION.cff"
COPY = "files/CITATION.cff"  # path on the site, where _site.py puts what pages link to
PAGE = """# Citation

Please cite the paper of the method, and the software where its version matters:

```
{paper}

{software}
```

The same as a file that reference managers read: [CITATION.cff](../CITATION.cff).
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page."""
    files.append(File.generated(config, "citation.md", content=page(SOURCE.read_text("utf-8"))))
    if files.get_file_from_path(COPY) is None:
        files.append(File.generated(config, COPY, abs_src_path=str(SOURCE)))
    return files


def page(citation: str) -> str:
    """Write the page from the text of CITATION.cff."""
    software = yaml.safe_load(citation)
    paper = software["preferred-citation"]
    return PAGE.format(
        paper=_bibtex(
            "inproceedings",
            f"{paper['authors'][0]['family-names'].lower()}{paper['year']}boft",
            title=paper["title"],
            author=_authors(paper["authors"]),
            booktitle=paper["collection-title"],
            year=paper["year"],
            url=paper["url"],
        ),
        software=_bibtex(
            "software",
            software["title"],
            title=software["title"],
            author=_authors(software["authors"]),
            version=software["version"],
        ),
    )


def _bibtex(kind: str, key: str, **fields: str | int) -> str:
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    folded = [textwrap.fill(line, 80, subsequent_indent="    ") for line in lines]
    return "\n".join([f"@{kind}{{{key},", *folded, "}"])


def _authors(people: list[dict[str, str]]) -> str:
    """Join names as BibTeX does; the name of a group is in braces of its own."""
    return " and ".join(
        f"{{{p['name']}}}" if "name" in p else f"{p['family-names']}, {p['given-names']}"
        for p in people
    )
