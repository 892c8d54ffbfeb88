"""Hooks of the MkDocs site: the repository's own pages, links out of docs/, and nothing forgotten.

The Markdown files are written to be read in the repository, where links are relative to the file.
On the site README.md is the first page, CONTRIBUTING.md one of the pages, and what else a page
links to outside of docs/ (raw results, the licence, a source file) is copied into ``files/``. Pages
that the nav does not name, and public names that api.md does not, come to the end.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = "docs"
# Pages of the repository that are pages of the site: their paths in both.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
FILES = "files"  # where copies of other files of the repository lie on the site
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add what the nav does not name: a page to the section of its folder, or to the end."""
    named = set(_paths(config.nav))
    for path in sorted((ROOT / DOCS).rglob("*.md")):
        page = path.relative_to(ROOT / DOCS).as_posix()
        if page not in named:
            _section(config.nav, _folder(page)).append(page)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Bring in the pages from outside of docs/, and the files that pages link to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    pages = [ROOT / source for source in PAGES] + sorted((ROOT / DOCS).rglob("*.md"))
    for page in pages:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for _, link, _ in LINK.findall(text):
            target = _in_repository(page, link)
            if target is None or target in PAGES or target.startswith(f"{DOCS}/"):
                continue
            for new in _copies(config, target):
                if files.get_file_from_path(new.src_uri) is None:
                    files.append(new)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of the repository lead to the same things on the site; complete api.md."""
    if page.file.src_uri == "api.md":
        markdown += "".join(f"\n::: {name}\n" for name in _not_placed(markdown))
    source = {uri: path for path, uri in PAGES.items()}.get(page.file.src_uri)
    path = ROOT / (source or f"{DOCS}/{page.file.src_uri}")
    here = PurePosixPath(page.file.src_uri).parent

    def rewritten(match: re.Match) -> str:
        target = _in_repository(path, match[2])
        if target is None:
            return match[0]
        if target in PAGES:
            uri = PAGES[target]
        elif target.startswith(f"{DOCS}/"):
            uri = target.removeprefix(f"{DOCS}/")
        else:
            uri = f"{FILES}/{target}" + ("/index.md" if (ROOT / target).is_dir() else "")
        return match[1] + os.path.relpath(uri, here) + match[3]

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):  # code is left as it is
        parts += [LINK.sub(rewritten, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(rewritten, markdown[end:])])


def _not_placed(api: str) -> list[str]:
    """What the package exports and api.md has no place for, where it is defined."""
    tree = ast.parse((ROOT / "boft_ops" / "__init__.py").read_text(encoding="utf-8"))
    placed = set(re.findall(r"^::: \S+\.(\w+)$", api, re.MULTILINE))
    found = []
    for line in tree.body:
        # "from .ops.cayley import cayley", but not "from ._runtime import paths"
        if isinstance(line, ast.ImportFrom) and not line.module.startswith("_"):
            names = [alias.name for alias in line.names]
            found += [f"boft_ops.{line.module}.{n}" for n in names if n not in placed]
    return found


def _in_repository(page: Path, link: str) -> str | None:
    """The path in the repository that a page's link leads to; None if it leads elsewhere."""
    if re.match(r"[a-z]+:|/", link):
        return None
    target = (page.parent / link).resolve()
    return target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else None


def _copies(config: MkDocsConfig, target: str) -> list[File]:
    """A file of the repository as one of the site; a folder as its files and a list of them."""
    path, apart = ROOT / target, {"inclusion": InclusionLevel.NOT_IN_NAV}
    if path.is_file():
        return [File.generated(config, f"{FILES}/{target}", abs_src_path=str(path))]
    if not path.is_dir():
        return []  # mkdocs will say that the link leads nowhere
    inside = [p.relative_to(path).as_posix() for p in sorted(path.rglob("*")) if p.is_file()]
    content = f"# {target}\n\n" + "".join(f"- [{name}]({name})\n" for name in inside)
    made = [File.generated(config, f"{FILES}/{target}/index.md", content=content, **apart)]
    for name in inside:
        uri = f"{FILES}/{target}/{name}"
        made.append(File.generated(config, uri, abs_src_path=str(path / name), **apart))
    return made


def _paths(nav: list | dict | str | None) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav or []
    return [path for value in values for path in _paths(value)]


def _section(nav: list, folder: PurePosixPath) -> list:
    """The section of the nav that holds pages of a folder; the nav itself where there is none."""
    if folder != PurePosixPath("."):
        for item in nav:
            for pages in item.values() if isinstance(item, dict) else ():
                if isinstance(pages, list) and folder in map(_folder, _paths(pages)):
                    return pages
    return nav


def _folder(page: str) -> PurePosixPath:
    return PurePosixPath(page).parent
