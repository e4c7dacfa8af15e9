"""Hooks of mkdocs: pages and pictures that lie beside docs/ are part of the site.

Links are written as they lead in the checkout: README.md names docs/speed.md, and that ../benchmarks/NAME.png. On
the site the pages of docs/ lie at the root, and all else where it lies in the checkout.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "assets/longbench-real/README.md")
# (link): of a file, relative, without its anchor
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
# code is no text: neither a fenced block nor what stands between backticks
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.M | re.S)


def links(text: str) -> list[str]:
    """The files that a page links to, as written."""
    return LINK.findall(CODE.sub("", text))


def target(link: str, page: str) -> str:
    """Where a link of a page leads, both by their places on the site."""
    folder = posixpath.dirname(page) if page in PAGES else "docs"
    return posixpath.normpath(posixpath.join(folder, link)).removeprefix("docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the site: those of docs/, the pages beside it, and whatever else a page links to or shows."""
    from mkdocs.structure.files import File

    sources = {name: ROOT / name for name in PAGES} | {path.name: path for path in (ROOT / "docs").glob("*.md")}
    linked = {target(link, name) for name, path in sources.items() for link in links(path.read_text(encoding="utf-8"))}
    for name in sorted(linked | set(PAGES)):
        if files.get_file_from_path(name) is None and (ROOT / name).is_file():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page with its links as they lead on the site."""
    at = page.file.src_uri

    def led(match: re.Match[str]) -> str:
        name, mark, anchor = match[0].partition("#")
        return posixpath.relpath(target(name, at), posixpath.dirname(at) or ".") + mark + anchor

    return LINK.sub(led, markdown)
