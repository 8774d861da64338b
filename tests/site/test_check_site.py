"""Before a deploy: what is not there, or is only a stub, is noticed."""

import re

import pytest
from built_site import ROOT

from book import check_site
from book.check_site import LEAST, faults

TOC = """format: jb-book
root: book/intro
parts:
  - caption: Chapters
    chapters:
      - file: book/chapters/01-one
        sections:
          - file: book/more
"""
CHAPTER, COPY = "book/chapters/01-one.html", "notebooks/01-one.ipynb"


@pytest.fixture
def whole(tmp_path):
    """A site in which each file is as large as it must be."""
    (tmp_path / "_toc.yml").write_text(TOC, encoding="utf-8")
    sizes = {"book/intro.html": 15_000, CHAPTER: 15_000, "book/more.html": 15_000}
    for name, size in (sizes | {COPY: 5_000} | LEAST).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b" " * size)
    return tmp_path


def test_a_whole_site_passes(whole):
    assert faults(whole, whole) == []


@pytest.mark.parametrize(
    "name", [CHAPTER, "book/more.html", COPY, "drone-book.pdf", "drone-book.epub"]
)
def test_what_is_missing_or_cut_short_is_named(whole, name):
    (whole / name).write_bytes(b"<html>")
    (fault,) = faults(whole, whole)
    assert fault.startswith(f"{name}: 6 bytes")
    (whole / name).unlink()
    assert faults(whole, whole) == [f"{name}: is missing"]


def test_a_fault_stops_the_deploy(whole, monkeypatch):
    monkeypatch.setattr(check_site, "SITE", whole)
    with pytest.raises(SystemExit, match="not whole"):
        check_site.main()


def test_the_built_site_has_all_but_what_is_printed(site):
    assert [f for f in faults(site) if not f.startswith("drone-book.")] == []


def test_the_deploy_job_asks_before_it_uploads():
    workflow = (ROOT / ".github" / "workflows" / "book.yml").read_text(encoding="utf-8")
    assert workflow.index("make pdf epub") < workflow.index("make whole")
    assert workflow.index("make whole") < workflow.index("upload-pages-artifact")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "book.check_site" in re.search(r"^whole:.*\n\t.*", makefile, re.MULTILINE)[0]


def test_links_and_lighthouse_are_tried_each_week():
    path = ROOT / ".github" / "workflows" / "weekly.yml"
    workflow = path.read_text(encoding="utf-8")
    assert "make linkcheck" in workflow
    assert "make lighthouse" in workflow
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    config = (ROOT / "_config.yml").read_text(encoding="utf-8")
    ignored = re.search(r"linkcheck_ignore: \['(.*)'\]", config)[1]
    assert re.match(ignored, "../book/ledger.html#headline")
    assert not re.match(ignored, "https://example.org")
    for target in ("linkcheck", "lighthouse"):
        assert re.search(rf"^{target}: ", makefile, re.MULTILINE)
