"""The book as PDF: pages of a small site, printed, joined, read again."""

import subprocess
import sys

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
def small(tmp_path_factory):
    """Two pages of one and two sheets, as a PDF that was written and read."""
    site = tmp_path_factory.mktemp("small")
    (site / "first.html").write_text(HTML.format(FIRST), encoding="utf-8")
    (site / "second.html").write_text(HTML.format(SECOND), encoding="utf-8")
    # another process: the browser of the other tests is still open in this one
    code = (
        "import sys; from pathlib import Path; from book.make_pdf import join; "
        "site = Path(sys.argv[1]); parts = {'Part': ['first', 'second']}; "
        "join(site, parts, sys.argv[2]).write(site / 'small.pdf')"
    )
    command = [sys.executable, "-c", code, str(site), URL]
    subprocess.run(command, check=True, cwd=ROOT)
    return PdfReader(site / "small.pdf")


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


def test_paper_has_every_page_but_those_of_a_screen(site):
    on_paper = {f"{name}.html" for part in listed().values() for name in part}
    left_out = {name for name in pages(site) if name.startswith(ON_SCREEN)}
    assert on_paper | left_out == set(pages(site))
    assert not on_paper & left_out
