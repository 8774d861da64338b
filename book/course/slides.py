"""A deck for a chapter, made of the chapter's own cells.

`slides/NN.yaml` says which cells, equations, theorems and figures stand on which slide,
and what the speaker says. A label or a cell that the chapter no longer has is an error.
"""

import html
import re
import shutil
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from book.course import markup, tables
from book.course.chapter import Chapter, published

FOLDER = Path(__file__).parent / "slides"
TEMPLATE = FOLDER / "deck.html"
MOST_LINES, WIDEST = 16, 76  # more cannot be read from the last row
SHORT = 420  # characters; fewer are set larger
STYLE = "a11y-high-contrast-light"
# The wheel of sphinx-revealjs carries reveal.js, so that no deck needs a network.
CARRIER = "sphinx-revealjs"
REVEAL = ("dist/reveal.js", "dist/reveal.css", "plugin/notes/notes.js")

Part = dict[str, Any]


def chapters(folder: Path = FOLDER) -> list[str]:
    """Two digits of each chapter that has a deck."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def deck(number: str, folder: Path = FOLDER, chapter: Chapter | None = None) -> str:
    """The HTML of a chapter's deck."""
    chapter = chapter or published(number)
    source = yaml.safe_load((folder / f"{number}.yaml").read_text(encoding="utf-8"))
    made = []
    for place, slide in enumerate(source["slides"], 1):
        where = f"{number}.yaml, slide {place} ({slide.get('title', '?')!r})"
        if slide.keys() != {"title", "parts", "notes"}:
            raise ValueError(f"{where}: a slide has title, parts and notes.")
        try:
            parts = [_part(chapter, part) for part in slide["parts"]]
        except (LookupError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        made.append(
            {
                "title": markup.inline_html(slide["title"]),
                "parts": parts,
                "size": _size(parts),
                "notes": markup.to_html(slide["notes"]),
            }
        )
    template = Environment(autoescape=False).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    page: str = template.render(
        chapter=markup.inline_html(chapter.title()), number=number, slides=made
    )
    return page


def write(target: Path) -> None:
    """Every deck, and what a deck needs to run, into one folder."""
    for name in REVEAL:
        shutil.copy(_carried(name), target / Path(name).name)
    shutil.copy(FOLDER / "deck.css", target)
    for number in chapters():
        page = deck(number)
        (target / f"slides-{number}.html").write_text(page, encoding="utf-8")


def _size(parts: list[str]) -> str:
    """A class of the slide: what is short is shown large, lest the page look empty."""
    words = "".join(re.sub(r"<[^>]*>", "", part) for part in parts)
    return "large" if len(words) < SHORT and "<img" not in "".join(parts) else ""


def _carried(name: str) -> Path:
    for file in distribution(CARRIER).files or []:
        if file.as_posix().endswith(f"revealjs/{name}"):
            return Path(str(file.locate()))
    raise RuntimeError(f"{CARRIER} carries no {name}; reinstall it.")


def _part(chapter: Chapter, part: Part) -> str:
    """The HTML of one part: its one key that names a kind says which."""
    kinds = KINDS.keys() & part.keys()
    if len(kinds) != 1:
        raise ValueError(f"{part!r} needs exactly one of {sorted(KINDS)}.")
    (kind,) = kinds
    return KINDS[kind](chapter, part)


def _say(chapter: Chapter, part: Part) -> str:
    return markup.to_html(part["say"])


def _paragraph(chapter: Chapter, part: Part) -> str:
    return markup.to_html(chapter.paragraph(part["paragraph"]))


def _bullets(chapter: Chapter, part: Part) -> str:
    return markup.to_html(chapter.bullets(part["bullets"]))


def _reading(chapter: Chapter, part: Part) -> str:
    return markup.to_html(chapter.reading(part["reading"]))


def _equation(chapter: Chapter, part: Part) -> str:
    return rf"<div>\[{html.escape(chapter.equation(part['equation']))}\]</div>"


def _block(chapter: Chapter, part: Part) -> str:
    title, body = chapter.block(part["block"])
    name = f"<h3>{markup.inline_html(title)}</h3>" if title else ""
    return f'<div class="theorem">{name}{markup.to_html(body)}</div>'


def _figure(chapter: Chapter, part: Part) -> str:
    pictures, alt = chapter.figure(part["figure"])
    first = f'src="{pictures[0]}" alt="{html.escape(alt)}"'
    if len(pictures) == 1:
        return f'<img class="r-stretch" {first}>'
    second = f'src="{pictures[1]}" alt="The lower panels of the same figure."'
    return f'<div class="halves"><img {first}><img {second}></div>'


def _code(chapter: Chapter, part: Part) -> str:
    cell = chapter.cell(part["code"])
    lines = cell.source.splitlines()
    for end, words in ((0, part.get("first")), (-1, part.get("last"))):
        if words is None:
            continue
        found = [at for at, line in enumerate(lines) if words in line]
        if not found:
            raise LookupError(f"cell {cell.id!r} has no line with {words!r}.")
        lines = lines[found[0] :] if end == 0 else lines[: found[0] + 1]
    if len(lines) > MOST_LINES or max(map(len, lines)) > WIDEST:
        raise ValueError(
            f"cell {cell.id!r} gives {len(lines)} lines of up to "
            f"{max(map(len, lines))} characters; at most {MOST_LINES} of {WIDEST} can "
            "be read: choose some with first and last."
        )
    made: str = highlight(
        "\n".join(lines), PythonLexer(), HtmlFormatter(style=STYLE, noclasses=True)
    )
    return made


def _output(chapter: Chapter, part: Part) -> str:
    mime, text = chapter.output(part["output"])
    if mime == "text/html":
        return f'<div class="output">{text}</div>'
    if mime == "text/markdown":
        return f'<div class="output">{markup.to_html(text)}</div>'
    return f'<pre class="output">{html.escape(text)}</pre>'


def _table(chapter: Chapter, part: Part) -> str:
    """A table of a cell, or the rows, groups and columns of it that are named."""
    (_, text), *_ = chapter.tables(part["table"])
    named = {key: tuple(part.get(key, ())) for key in ("groups", "rows", "columns")}
    return f'<div class="output">{tables.chosen(text, **named)}</div>'


KINDS: dict[str, Callable[[Chapter, Part], str]] = {
    "say": _say,
    "paragraph": _paragraph,
    "bullets": _bullets,
    "reading": _reading,
    "equation": _equation,
    "block": _block,
    "figure": _figure,
    "code": _code,
    "output": _output,
    "table": _table,
}
