"""Tables of the chapters on paper: for the class with empty entries, then as found.

A sheet takes its table from the published chapter, so no number of it is typed. A cell
or a group of rows that the chapter no longer has is an error.
"""

import html
import shutil
from copy import copy
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

from book.course import markup, tables
from book.course.chapter import published
from book.course.tables import Element

FOLDER = Path(__file__).parent / "slides"
TEMPLATE = FOLDER / "handout.html"


@dataclass(frozen=True)
class Handout:
    """What one sheet shows, asks and leaves empty."""

    chapter: str  # two digits
    cell: str  # whose output is the table
    title: str
    ask: str  # Markdown; what the class does before the second page is shown
    paragraph: str = ""  # the chapter's own, by its first words, that says what is what
    groups: tuple[str, ...] = ()  # of rows, by their heading; empty: all
    # (row, column) where the number is of no use: plain SVD keeps no data at all
    dashed: tuple[tuple[str, str], ...] = ()
    covered: str = ""  # rows with this in their name are left empty; "": every row


HANDOUTS = {
    "02": Handout(
        "02",
        "whiten-table",
        "Predict the table",
        "In pairs, ten minutes. Write **0** where a way reaches the minimum, and a "
        "guess in percent where it does not. Then number the four ways by time, "
        "fastest first, and mark those that keep more as more tokens come.",
        paragraph="Three kinds of inputs:",
        groups=("384 × 384", "384 × 1536"),
        dashed=(("SVD", "data (MB)"),),
    ),
    "07": Handout(
        "07",
        "table",
        "Judge it without its rivals",
        "The rows of the smaller dense models are empty. Would you use DRONE? Write "
        "down your answer and what each smaller dense model will lose; then turn the "
        "page and judge again.",
        covered="layer",
    ),
}


def page(handout: Handout) -> str:
    """The HTML of a sheet: a page for the class, a page with what was found."""
    chapter = published(handout.chapter)
    shown = [
        (
            markup.to_html(above),
            _dashed(tables.chosen(text, handout.groups), handout.dashed),
        )
        for above, text in chapter.tables(handout.cell)
    ]
    told = chapter.paragraph(handout.paragraph) if handout.paragraph else ""
    made: str = (
        Environment(autoescape=False)
        .from_string(TEMPLATE.read_text(encoding="utf-8"))
        .render(
            title=html.escape(handout.title),
            section=markup.inline_html(chapter.section(handout.cell)),
            ask=markup.to_html(handout.ask),
            paragraph=markup.to_html(told),
            empty=[(above, _emptied(table, handout.covered)) for above, table in shown],
            whole=shown,
        )
    )
    return made


def write(target: Path) -> None:
    """Every sheet, and its style, into one folder."""
    shutil.copy(FOLDER / "handout.css", target)
    for number, handout in HANDOUTS.items():
        text = page(handout)
        (target / f"handout-{number}.html").write_text(text, encoding="utf-8")


def _dashed(table: Element, dashed: tuple[tuple[str, str], ...]) -> Element:
    """The table, with a dash in the named entries of each group of rows."""
    head = [name.text for name in table.select("thead th")]
    for name, column in dashed:
        rows = [row for row in table.select("tbody tr") if row.th.text == name]
        if column not in head or not rows:
            raise LookupError(f"no entry of {name!r} in {column!r}; there are {head}.")
        for row in rows:
            row.select("th, td")[head.index(column)].string = "–"
    return table


def _emptied(table: Element, covered: str) -> Element:
    """A copy whose covered rows have a name and no entries."""
    made = copy(table)
    rows = [row for row in made.select("tbody tr") if covered in row.th.text]
    if not rows:
        raise LookupError(f"no row has {covered!r} in its name.")
    for row in rows:
        for cell in row.select("td"):
            cell.clear()
            cell.attrs = {"class": "empty"}
    return made
