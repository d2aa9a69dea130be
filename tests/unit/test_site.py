# SPDX-License-Identifier: MIT
"""The documentation as a site: it is built without a warning, every link leads somewhere, and every page is reached."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

pytest.importorskip("mkdocs", reason="scripts/setup installs mkdocs")

from tools import docs_site

ROOT: Final = Path(__file__).parents[2]


class Page(HTMLParser):
    """The links of a page, and the places in it that a link can name."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path: Final = path
        self.links: Final[list[str]] = []
        self.names: Final[set[str]] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value is not None}
        self.names.update(found[name] for name in ("id", "name") if name in found)
        link = found.get("href" if tag in {"a", "link"} else "src")
        if link is not None:
            self.links.append(link)


def targets(page: Page) -> dict[str, tuple[Path, str]]:
    """Return where the links into the site lead: a file, and a place in it."""
    inside = [link for link in page.links if not urlsplit(link).scheme and not link.startswith("//")]
    found = {}
    for link in inside:
        path, place = urldefrag(link)
        found[link] = ((page.path.parent / unquote(path)).resolve() if path else page.path, place)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """Build the site, and return its pages."""
    directory = tmp_path_factory.mktemp("site").resolve()
    words = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--site-dir", str(directory)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return {path: Page(path) for path in directory.rglob("*.html") if path.name != "404.html"}


def test_every_link_leads_to_something_that_is_there(site: dict[Path, Page]) -> None:
    broken = [
        f"{page.path.name}: {link}"
        for page in site.values()
        for link, (path, place) in targets(page).items()
        if not path.exists() or (place and path in site and place not in site[path].names)
    ]
    assert broken == []


def test_every_page_is_reached_from_the_first(site: dict[Path, Page]) -> None:
    (first,) = (path for path in site if path.name == "index.html" and (path.parent / "usage.html").exists())
    reached, todo = {first}, [first]
    while todo:
        for path, _ in targets(site[todo.pop()]).values():
            if path in site and path not in reached:
                reached.add(path)
                todo.append(path)
    assert site.keys() - reached == set()
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= {path.name for path in reached}
    assert {f"vfio-mig-{name}.html" for name in ("save", "restore", "list")} <= {path.name for path in reached}


def test_a_path_in_a_sentence_is_a_link(site: dict[Path, Page]) -> None:
    (usage,) = (page for path, page in site.items() if path.name == "usage.html")
    assert {"gvt-host.html", "scripting.html", "conform.html"} <= set(usage.links)


def test_a_path_in_parentheses_is_a_link_too_and_no_page_names_another_without(site: dict[Path, Page]) -> None:
    names = {f"{path.stem}.md" for path in (ROOT / "docs").glob("*.md")}
    left = {
        (path.name, name)
        for path in site
        for text in re.findall(r">([^<]+)<", re.sub(r"(?s)<(pre|code|a)\b.*?</\1>", "", path.read_text("utf-8")))
        for name in re.findall(r"docs/([\w-]+\.md)", text)
        if name in names
    }
    assert left == set()


def test_every_page_of_docs_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f": {path.name}\n" not in menu] == []


def test_nothing_of_a_page_comes_from_elsewhere_and_its_menu_s_script_understands_every_place(
    site: dict[Path, Page],
) -> None:
    text = {path.name: path.read_text("utf-8") for path in site}
    assert [
        name for name, html in text.items() if re.search(r"<(?:script|link|img)[^>]+(?:src|href)=.https?:", html)
    ] == []
    # Bootstrap takes what is behind # for a CSS selector, which begins with no digit, and stops there
    assert [(page.path.name, one) for page in site.values() for one in page.names if one[:1].isdigit()] == []
    assert "\\|" not in text["usage.html"]


def test_the_examples_in_docstrings_are_true() -> None:
    result = doctest.testmod(docs_site)
    assert result.attempted > 0
    assert result.failed == 0
