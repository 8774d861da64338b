"""Sheets to print: the chapter's own table, empty for the class and then whole."""

from dataclasses import replace

import pytest
from bs4 import BeautifulSoup

from book.course import chapter, handouts


@pytest.fixture(params=handouts.HANDOUTS)
def sheet(request):
    """(handout, tables for the class, tables as found)"""
    handout = handouts.HANDOUTS[request.param]
    page = BeautifulSoup(handouts.page(handout), "html.parser")
    first, second = (part.select("table") for part in page.select("section"))
    return handout, first, second


def rows(tables):
    """{(table, row's place): (name, entries)}"""
    return [
        (row.th.text, [cell.text for cell in row.select("td")])
        for table in tables
        for row in table.select("tbody tr:not(.group)")
    ]


def test_covered_rows_are_empty_and_all_others_as_published(sheet):
    handout, first, second = sheet
    published = rows(
        BeautifulSoup(html, "html.parser")
        for _, html in chapter.published(handout.chapter).tables(handout.cell)
    )
    dashed = {name for name, _ in handout.dashed}
    others = [row for row in rows(second) if row[0] not in dashed]
    assert others and all(row in published for row in others)
    for (name, given), (same, found) in zip(rows(first), rows(second), strict=True):
        assert name == same and len(given) == len(found)
        assert given == ([""] * len(found) if handout.covered in name else found)
    assert any(not any(given) for _, given in rows(first))


def test_plain_svd_keeps_no_data():
    page = BeautifulSoup(handouts.page(handouts.HANDOUTS["02"]), "html.parser")
    _, found = page.select("section")
    kept = {name: entries[-1] for name, entries in rows(found.select("table"))}
    assert kept["SVD"] == "–" and float(kept["DRONE"]) > 0


def test_only_the_named_groups_are_asked():
    handout = handouts.HANDOUTS["02"]
    page = BeautifulSoup(handouts.page(handout), "html.parser")
    names = [name.text for name in page.section.select("tr.group th")]
    assert tuple(names) == handout.groups
    assert "All rows" not in page.text


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"cell": "gone"}, "no cell 'gone'"),
        ({"cell": "setup"}, "shows no table"),
        ({"groups": ("7 × 7",)}, "no rows"),
        ({"dashed": (("SVD", "gone"),)}, "no entry of 'SVD'"),
        ({"covered": "a rival nobody has"}, "no row has"),
        ({"paragraph": "Gone words"}, "no paragraph"),
    ],
)
def test_what_the_chapter_no_longer_has_is_an_error(change, complaint):
    with pytest.raises(LookupError, match=complaint):
        handouts.page(replace(handouts.HANDOUTS["02"], **change))
