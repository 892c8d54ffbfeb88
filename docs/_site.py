"""Hooks of the MkDocs site: pages from outside of docs/, their links, and complete lists.

The Markdown files are written for the repository, where links are relative to the file. On the
site, README.md is the first page and CONTRIBUTING.md is one of the pages. Other files outside of
docs/ that a page links to, such as raw results, the license or a source file, are copied into
``files/``. Pages that the nav does not name, and public names that api.md does not name, are added
at the end.
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
# Pages of the site from outside of docs/: path in the repository -> path on the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
FILES = "files"  # folder of the site for copies of other files of the repository
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add pages that the nav does not name, to the section of their folder or to the end."""
    named = set(nav_paths(config.nav))
    for path in sorted((ROOT / DOCS).rglob("*.md")):
        page = path.relative_to(ROOT / DOCS).as_posix()
        if page not in named:
            _section(config.nav, _folder(page)).append(page)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside of docs/, and the files that pages link to."""
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
    """Rewrite links between files of the repository into links of the site; complete api.md."""
    if page.file.src_uri == "index.md":  # the whole width for the first screen
        page.meta["hide"] = ["navigation", "toc"]
    if page.file.src_uri == "api.md":
        markdown += "".join(f"\n::: {name}\n" for name in names_without_entry(markdown))
    source = {uri: path for path, uri in PAGES.items()}.get(page.file.src_uri)
    path = ROOT / (source or f"{DOCS}/{page.file.src_uri}")
    folder = PurePosixPath(page.file.src_uri).parent

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
        return match[1] + os.path.relpath(uri, folder) + match[3]

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):  # code blocks stay unchanged
        parts += [LINK.sub(rewritten, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(rewritten, markdown[end:])])


def names_without_entry(api: str) -> list[str]:
    """List the exported names that api.md has no entry for, with the modules that define them."""
    tree = ast.parse((ROOT / "boft_ops" / "__init__.py").read_text(encoding="utf-8"))
    entries = set(re.findall(r"^::: \S+\.(\w+)$", api, re.MULTILINE))
    missing = []
    for line in tree.body:
        # "from .ops.cayley import cayley" exports a name, "from ._runtime import paths" does not.
        if isinstance(line, ast.ImportFrom) and line.level == 1 and not line.module.startswith("_"):
            names = [alias.name for alias in line.names]
            missing += [f"boft_ops.{line.module}.{n}" for n in names if n not in entries]
    return missing


def _in_repository(page: Path, link: str) -> str | None:
    """Path in the repository that a link of a page leads to; None if it leads elsewhere."""
    if re.match(r"[a-z]+:|/", link):
        return None
    target = (page.parent / link).resolve()
    return target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else None


def _copies(config: MkDocsConfig, target: str) -> list[File]:
    """Make the site files of a file of the repository, or of a folder with a list of its files."""
    path, options = ROOT / target, {"inclusion": InclusionLevel.NOT_IN_NAV}
    if path.is_file():
        return [File.generated(config, f"{FILES}/{target}", abs_src_path=str(path))]
    if not path.is_dir():
        return []  # mkdocs reports the dead link
    names = [p.relative_to(path).as_posix() for p in sorted(path.rglob("*")) if p.is_file()]
    content = f"# {target}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
    copies = [File.generated(config, f"{FILES}/{target}/index.md", content=content, **options)]
    for name in names:
        uri = f"{FILES}/{target}/{name}"
        copies.append(File.generated(config, uri, abs_src_path=str(path / name), **options))
    return copies


def nav_paths(nav: list | dict | str | None) -> list[str]:
    """List the paths of all pages in a nav."""
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav or []
    return [path for value in values for path in nav_paths(value)]


def _section(nav: list, folder: PurePosixPath) -> list:
    """Find the section of the nav that has pages of a folder; else return the nav itself."""
    if folder != PurePosixPath("."):
        for item in nav:
            for pages in item.values() if isinstance(item, dict) else ():
                if isinstance(pages, list) and folder in map(_folder, nav_paths(pages)):
                    return pages
    return nav


def _folder(page: str) -> PurePosixPath:
    return PurePosixPath(page).parent
