"""README and docs/: short where they are to be short, no link that leads nowhere, buildable as a site."""

import json
import re
import subprocess
import sys
import tomllib
import unicodedata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.docs.pages import DOCS, PAGES, README, ROOT, blocks, hooks, read, without_blocks

LONGEST = 9_000  # characters of the README
SCREEN = 80  # columns
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def headings(text: str) -> list[str]:
    return re.findall(r"^#{1,6} +(.+)$", without_blocks(text), re.M)


def anchor_of_github(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchor_of_the_site(heading: str) -> str:
    """Python-Markdown's."""
    plain = unicodedata.normalize("NFKD", heading.replace("`", "")).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def prose(page: Path) -> str:
    """A page, or what a notebook says between its cells of code."""
    if page.suffix != ".ipynb":
        return read(page)
    cells = json.loads(read(page))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def broken(page: Path, root: Path) -> list[str]:
    """The links of a page that lead nowhere: to no file of the checkout, or to no heading of a page."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", hooks.CODE.sub("", prose(page))):
        if re.match(r"[a-z]+:", link):
            continue  # an address elsewhere: tests use no network
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.is_file() or not target.is_relative_to(root):
            found.append(f"{page.name}: {link}: no such file")
        elif anchor and anchor not in map(anchor_of_github, headings(read(target))):
            found.append(f"{page.name}: {link}: no such heading")
    return found


def test_every_link_and_anchor_leads_somewhere():
    assert [line for page in [*PAGES, *NOTEBOOKS] for line in broken(page, ROOT)] == []
    assert all("](../" in prose(page) for page in NOTEBOOKS)


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "b.md").write_text("# One & two: `three`\n")
    page = tmp_path / "a.md"
    page.write_text(
        "# A\n[b](b.md) [b](b.md#one--two-three) [a](#a) [web](https://x.y) `[code](none.md)`\n"
        "```\n[x](none.md)\n```\n[c](c.md) ![picture](c.png) [b](b.md#two) [a](#b) [out](../other.md)\n"
    )
    (tmp_path.parent / "other.md").write_text("")
    lost = ["c.md", "c.png", "b.md#two", "#b", "../other.md"]
    assert [line.split(": ")[1] for line in broken(page, tmp_path)] == lost
    book = {"cells": [{"cell_type": "markdown", "source": ["# A\n", "[b](b.md) [c](c.md)"]}]}
    (tmp_path / "a.ipynb").write_text(json.dumps(book))
    assert broken(tmp_path / "a.ipynb", tmp_path) == ["a.ipynb: c.md: no such file"]


def test_a_heading_that_is_linked_to_has_the_same_anchor_on_the_site():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]*#[^)\s]+)\)", hooks.CODE.sub("", read(page))):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert anchor in map(anchor_of_the_site, headings(read(target))), f"{page.name}: {link}"


def test_the_readme_is_short_and_fits_a_screen():
    text = read(README)
    assert len(text) <= LONGEST
    shown = [
        line for language in ("", "python", "bibtex") for block in blocks(text, language) for line in block.splitlines()
    ]
    assert shown and [line for line in shown if len(line) > SCREEN] == []


def test_what_a_page_shows_of_a_screen_fits_one():
    # an output has no language and does not begin with a command
    wide = [
        f"{page.name}: {line}"
        for page in DOCS
        for block in blocks(read(page))
        if not block.startswith(("python ", "make ", "wandb "))
        for line in block.splitlines()
        if len(line) > SCREEN
    ]
    assert wide == []


def test_a_list_stands_after_an_empty_line():
    # the site takes it for a part of the paragraph above otherwise
    close = [
        f"{page.name}: {line}"
        for page in PAGES
        for above, line in re.findall(r"^([^\n]*)\n(- [^\n]*)", without_blocks(read(page), "```"), re.M)
        if above and not above.startswith(("- ", "  ", "#"))
    ]
    assert close == []


def test_every_page_is_in_the_sites_contents_once():
    def names(node):
        if isinstance(node, str):
            return [node]
        return [name for part in (node.values() if isinstance(node, dict) else node) for name in names(part)]

    told = names(yaml.safe_load(read(ROOT / "mkdocs.yml"))["nav"])
    assert sorted(told) == sorted([*hooks.PAGES, *(page.name for page in DOCS)])
    assert set(PAGES) == {ROOT / name for name in hooks.PAGES} | set(DOCS)


def test_every_page_that_one_links_to_is_in_the_sites_contents():
    sources = {name: ROOT / name for name in hooks.PAGES} | {page.name: page for page in DOCS}
    led = {hooks.target(link, name) for name, page in sources.items() for link in hooks.links(read(page))}
    assert {name for name in led if name.endswith(".md")} <= set(sources)


def test_links_of_the_checkout_become_links_of_the_site():
    def made(page: str, text: str) -> str:
        return hooks.on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(src_uri=page)), None, None)

    assert (
        made("README.md", "[a](docs/speed.md#x) [e](#f) [g](https://h.i)") == "[a](speed.md#x) [e](#f) [g](https://h.i)"
    )
    text = "![b](../benchmarks/results/latency.png) [c](../CONTRIBUTING.md#x) [d](sweeps.md) `[h](none.md)`"
    assert made("speed.md", text).startswith(
        "![b](benchmarks/results/latency.png) [c](CONTRIBUTING.md#x) [d](sweeps.md) "
    )
    card = "assets/longbench-real/README.md"
    assert made(card, "[a](../../docs/results.md#b) [c](subsets.yaml)") == "[a](../../results.md#b) [c](subsets.yaml)"
    assert hooks.links(text) == ["../benchmarks/results/latency.png", "../CONTRIBUTING.md", "sweeps.md"]


@pytest.mark.skipif(find_spec("material") is None, reason="needs mkdocs-material, which make docs installs")
def test_the_site_can_be_built_and_refuses_a_broken_link(tmp_path):
    def build(config: Path):
        command = [sys.executable, "-m", "mkdocs", "build", "-f", str(config), "-d", str(tmp_path / "site")]
        return subprocess.run(command, capture_output=True, text=True, timeout=240)

    done = build(ROOT / "mkdocs.yml")
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("index.html", "results.html", "benchmarks/results/core.png"):
        assert (tmp_path / "site" / name).is_file()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n[b](#c)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nstrict: true\nvalidation: {anchors: warn}\n")
    assert build(tmp_path / "mkdocs.yml").returncode == 1


def test_the_citation_is_of_this_version_and_licence():
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    cited = yaml.safe_load(read(ROOT / "CITATION.cff"))
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert cited["authors"] == [{"name": "The kvfrontier authors"}]
    bibtex = blocks(read(README), "bibtex")[0]
    assert f"version = {{{project['version']}}}" in bibtex and cited["title"] in bibtex
    assert "Apache License" in read(ROOT / "LICENSE")
