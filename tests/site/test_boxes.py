"""Exercises, solutions, theorems, tables have an address; a chapter is to be cited."""

import importlib.util
import re
from collections import Counter

import pytest
import yaml
from built_site import CHAPTER, ROOT, needs_browser, pages, soup

CHAPTERS = sorted((ROOT / "book" / "chapters").glob("*.ipynb"))
BOXES = """article :is(.exercise, .solution, .proof:has(.caption-number))
  > .admonition-title, article table.results > caption"""


def html(path):
    return f"book/chapters/{path.stem}.html"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_box_or_table_has_a_link_to_itself(site, path):
    page = soup(site / html(path))
    places = Counter(tag["id"] for tag in page.select("article [id]"))
    boxes = page.select(BOXES)
    assert len(boxes) >= 6
    for title in boxes:
        (link,) = title.select("a.headerlink")
        assert link["href"] == f"#{title.parent['id']}"
        assert places[title.parent["id"]] == 1
        assert re.fullmatch("Link to this [a-z]+", link["title"])


def test_the_tables_have_links_too(site):
    ids = [tag["id"] for tag in soup(site / html(CHAPTERS[6])).select("table.results")]
    assert len(ids) >= 5
    assert all(name.startswith("table-") for name in ids)


@needs_browser
def test_the_link_is_seen_under_the_pointer_and_leaves_the_fold(address, page):
    page.goto(address + CHAPTER, wait_until="load")
    title = page.locator(".solution > .admonition-title").first
    link = title.locator("a.headerlink")
    assert not link.is_visible()
    title.hover()
    assert link.is_visible()
    link.click()
    anchor = title.evaluate("title => title.parentElement.id")
    assert page.url.endswith("#" + anchor)
    page.locator(f"#{anchor} pre").first.wait_for(state="visible", timeout=5_000)


def test_no_page_has_a_header_without_a_word(site):
    for name in pages(site):
        assert [
            h for h in soup(site / name).select("th") if not h.get_text(strip=True)
        ] == []


@pytest.fixture(scope="module")
def cite():
    path = ROOT / "book" / "_ext" / "cite.py"
    spec = importlib.util.spec_from_file_location("cite", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_says_how_to_cite_it(site, path):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    page = soup(site / html(path))
    (line,) = page.select("article p.cite-chapter")
    said = line.get_text()
    title = page.h1.contents[0].strip()
    assert f"“{title}" in said
    assert citation["title"] in said
    assert citation["authors"][0]["name"] in said
    assert f"version {citation['version']}, 20" in said


def test_a_citation_has_the_year_and_address_of_the_file(cite):
    book = {
        "title": "A <book>",
        "version": "1.0",
        "authors": [{"given-names": "A.", "family-names": "B"}, {"name": "C"}],
    }
    line = cite.reference(book, "One", "book/one", "2026, free")
    assert "A. B and C: “One”" in line
    assert "A &lt;book&gt;" in line
    assert "version 1.0, 2026." in line
    assert "href" not in line
    book |= {"date-released": "2025-03-01", "url": "https://example.org/"}
    line = cite.reference(book, "One", "book/one", "2026, free")
    assert "2025." in line
    assert 'href="https://example.org/book/one.html"' in line
    with pytest.raises(ValueError, match="no year"):
        cite.reference({**book, "date-released": "soon"}, "One", "book/one", "")


def test_only_chapters_are_cited(site):
    for name in pages(site):
        cited = bool(soup(site / name).select("p.cite-chapter"))
        assert cited == name.startswith("book/chapters/")
