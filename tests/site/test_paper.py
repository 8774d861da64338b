"""The book as PDF and EPUB: pages of a small site, made, joined, read again."""

import subprocess
import sys
import zipfile
from urllib.parse import urldefrag
from xml.etree import ElementTree

import pytest
from built_site import ROOT, needs_browser, pages
from pypdf import PdfReader

from book.open_site import ON_SCREEN, listed

HTML = "<!doctype html><html lang='en'><body><article>{}</article></body></html>"
URL = "https://example.org/book/"
FIRST = """<h1>First</h1><p><a href="second.html#far">There</a>
  <a href="more/quiz.html">Quiz</a></p>
  <div class="solution"><p class="toggle-hidden">ANSWER</p></div>
  <h2>Later</h2><p>LAST WORDS</p>"""
SECOND = """<h1>Second</h1><p style="break-after: page">one</p>
  <h2 id="far">Far</h2><p><a href="first.html">Back</a></p>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two pages of one and two sheets as a PDF and as an EPUB."""
    site = tmp_path_factory.mktemp("small")
    (site / "first.html").write_text(HTML.format(FIRST), encoding="utf-8")
    (site / "second.html").write_text(HTML.format(SECOND), encoding="utf-8")
    # another process: the browser of the other tests is still open in this one
    code = (
        "import sys; from pathlib import Path; from book.make_pdf import join; "
        "site = Path(sys.argv[1]); parts = {'Part': ['first', 'second']}; "
        "join(site, parts, sys.argv[2]).write(site / 'small.pdf'); "
        "from book.make_epub import files_of, write; "
        "made = files_of(site, parts, sys.argv[2], '2026-01-01T00:00:00Z'); "
        "write(made, site / 'small.epub')"
    )
    command = [sys.executable, "-c", code, str(site), URL]
    subprocess.run(command, check=True, cwd=ROOT)
    return site


@pytest.fixture(scope="module")
def small(folder):
    return PdfReader(folder / "small.pdf")


@pytest.fixture(scope="module")
def epub(folder):
    """The files of the EPUB, those of XML read."""
    with zipfile.ZipFile(folder / "small.epub") as packed:
        first = packed.infolist()[0]
        assert (first.filename, first.compress_type) == ("mimetype", zipfile.ZIP_STORED)
        read = {name: packed.read(name) for name in packed.namelist()}
    assert read.pop("mimetype") == b"application/epub+zip"
    return {
        name: content if name.endswith(".css") else ElementTree.fromstring(content)
        for name, content in read.items()
    }


@needs_browser
class TestPdf:
    def test_has_cover_contents_and_all_pages(self, small):
        text = [sheet.extract_text() for sheet in small.pages]
        assert len(text) == 2 + 1 + 2
        assert "The DRONE Book" in text[0]
        assert "First" in text[1]
        assert "Part" in text[1]
        assert small.page_labels == ["i", "ii", "1", "2", "3"]
        assert [sheet.split()[-1] for sheet in text[2:]] == ["1", "2", "3"]

    def test_solutions_are_open_and_stand_at_the_end(self, small):
        words = small.pages[2].extract_text()
        assert words.index("LAST WORDS") < words.index("Solutions")
        assert words.index("Solutions") < words.index("ANSWER")

    def test_has_an_outline(self, small):
        first, below, second, _ = small.outline
        assert (first.title, second.title) == ("First", "Second")
        assert [item.title for item in below] == ["Later", "Solutions"]
        assert small.get_destination_page_number(second) == 3

    def test_links_lead_within_the_file_or_to_the_site(self, small):
        def leads(sheet):
            links = [a.get_object() for a in small.pages[sheet]["/Annots"]]
            return [
                link["/A"]["/URI"]
                if "/A" in link
                else small.get_page_number(link["/Dest"][0].get_object())
                for link in links
            ]

        assert leads(1) == [2, 3]  # the contents
        assert leads(2) == [4, URL + "more/quiz.html"]
        assert leads(4) == [2]


@needs_browser
class TestEpub:
    def test_lists_each_file_once_and_reads_the_pages_in_order(self, epub):
        package = epub["book/package.opf"]
        listed = [e.get("href") for e in package.findall(".//{*}manifest/{*}item")]
        others = {"META-INF/container.xml", "book/package.opf"}
        assert sorted(f"book/{name}" for name in listed) == sorted(set(epub) - others)
        order = [e.get("idref") for e in package.findall(".//{*}itemref")]
        assert order == ["cover", "nav", "page-0", "page-1"]
        contents = [a.get("href") for a in epub["book/nav.xhtml"].iterfind(".//{*}a")]
        assert contents == ["first.xhtml", "second.xhtml"]

    def test_links_lead_within_the_file_or_to_the_site(self, epub):
        links = [a.get("href") for a in epub["book/first.xhtml"].iterfind(".//{*}a")]
        assert links == ["second.xhtml#far", URL + "more/quiz.html"]
        file, anchor = urldefrag(links[0])
        assert epub[f"book/{file}"].find(f".//*[@id='{anchor}']") is not None

    def test_solutions_are_open_and_stand_at_the_end(self, epub):
        words = " ".join(epub["book/first.xhtml"].itertext())
        assert words.index("LAST WORDS") < words.index("Solutions")
        assert words.index("Solutions") < words.index("ANSWER")


def test_paper_has_every_page_but_those_of_a_screen(site):
    on_paper = {f"{name}.html" for part in listed().values() for name in part}
    left_out = {name for name in pages(site) if name.startswith(ON_SCREEN)}
    assert on_paper | left_out == set(pages(site))
    assert not on_paper & left_out
