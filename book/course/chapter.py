"""A chapter taken apart: what slides and quizzes take from it, by label or cell id."""

import re
from base64 import b64encode
from functools import cache
from pathlib import Path

import nbformat

from book.course import panels

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "book" / "chapters"
PICTURES = ("image/svg+xml", "image/png")
HEADING = re.compile(r"^#{1,2} +(.+)$", re.M)
EQUATION = r"\$\$\s*(?P<body>(?:(?!\$\$).)*?)\s*\$\$ *\({label}\)"
NUMBERED = re.compile(r"\$\$ *\(([\w-]+)\)$", re.M)
BLOCK = (
    r"^```\{{(?!exercise-start)[\w:-]+\}} *(?P<title>[^\n]*)\n:label: {label}\n"
    r"(?P<body>.*?)^```"
)
GATED = (
    r"^```\{{exercise-start\}} *(?P<title>[^\n]*)\n:label: {label}\n```"
    r"(?P<body>.*?)^```\{{exercise-end\}}"
)


class Chapter:
    """The cells of a published chapter, with the outputs that were published."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells = nbformat.read(path, as_version=4).cells

    def cell(self, cell_id: str) -> nbformat.NotebookNode:
        """The cell of that id."""
        cell: nbformat.NotebookNode
        for cell in self.cells:
            if cell.id == cell_id:
                return cell
        raise LookupError(f"{self.path.name} has no cell {cell_id!r}.")

    def title(self) -> str:
        """The chapter's own heading."""
        found = HEADING.search(self.cells[0].source)
        if found is None:
            raise LookupError(f"{self.path.name} does not begin with a heading.")
        return found[1]

    def section(self, anchor: str) -> str:
        """The heading under which a cell, an equation or a labelled block stands."""
        heading = self.title()
        for cell in self.cells:
            text = cell.source if cell.cell_type == "markdown" else ""
            place = 0 if cell.id == anchor else _place(text, anchor)
            before = HEADING.findall(text, 0, len(text) if place is None else place)
            if place == 0 and text.startswith("#"):  # the cell is the section's first
                before = HEADING.findall(text)[:1]
            heading = before[-1] if before else heading
            if place is not None:
                return str(heading)
        raise LookupError(f"{self.path.name} has no cell or label {anchor!r}.")

    def equation(self, label: str) -> str:
        """The TeX of a numbered equation, with its number."""
        body = self._labelled(EQUATION, label)["body"]
        return self.numbered(f"{body}\n$$ ({label})").removesuffix("\n$$")

    def numbered(self, text: str) -> str:
        """Text whose equations, and what points at one, have the page's numbers."""
        labels = [
            label
            for cell in self.cells
            if cell.cell_type == "markdown"
            for label in NUMBERED.findall(cell.source)
        ]

        def number(label: str) -> str:
            if label not in labels:
                raise LookupError(f"{self.path.name} has no equation {label!r}.")
            return f"{int(self.path.name[:2])}.{labels.index(label) + 1}"

        text = NUMBERED.sub(lambda found: rf"\tag{{{number(found[1])}}}" "\n$$", text)
        return re.sub(r"\{eq\}`([\w-]+)`", lambda found: f"({number(found[1])})", text)

    def block(self, label: str) -> tuple[str, str]:
        """Title and text of a theorem, an algorithm or an exercise."""
        try:
            found = self._labelled(BLOCK, label)
        except LookupError:
            found = self._labelled(GATED, label)
        return found["title"].strip(), self.numbered(found["body"].strip())

    def paragraph(self, start: str) -> str:
        """The paragraph, or list item, of the prose that starts with these words."""
        for cell in self.cells:
            if cell.cell_type == "markdown":
                for part in re.split(r"\n\s*\n|\n(?=- )", cell.source):
                    if part.strip().startswith(start):
                        return self.numbered(part.strip())
        raise LookupError(f"{self.path.name}: no paragraph starts with {start!r}.")

    def bullets(self, heading: str) -> str:
        """The list below a heading or in an admonition, as Markdown."""
        for cell in self.cells:
            _, found, rest = cell.source.partition(heading + "\n")
            items = re.findall(r"^- .*(?:\n  .*)*", rest, re.M)
            # an item's equation or code is left out: then nothing follows its colon
            items = [
                re.sub(r":$", ";" if i < len(items) else ".", item)
                for i, item in enumerate(items, 1)
            ]
            if cell.cell_type == "markdown" and found and items:
                return self.numbered("\n".join(items))
        raise LookupError(f"{self.path.name}: no list below {heading!r}.")

    def figure(self, cell_id: str) -> tuple[list[str], str]:
        """The picture, as addresses of its data, and the alt text of a figure.

        One far taller than wide comes in two halves, which stand side by side.
        """
        for output in self.cell(cell_id).get("outputs", []):
            for kind in PICTURES:
                alt = output.get("metadata", {}).get(kind, {}).get("alt")
                if alt and kind == "image/svg+xml":  # text here, and PNG is base64
                    halves = (
                        half.encode() for half in panels.halves(output.data[kind])
                    )
                    return [_address(kind, b64encode(h).decode()) for h in halves], alt
                if alt:
                    return [_address(kind, output.data[kind])], alt
        raise LookupError(f"{self.path.name}: cell {cell_id!r} shows no figure.")

    def output(self, cell_id: str) -> tuple[str, str]:
        """What a cell printed or returned, as (MIME type, text)."""
        for output in self.cell(cell_id).get("outputs", []):
            if output.output_type == "stream":
                return "text/plain", output.text
            for mime in ("text/html", "text/markdown", "text/plain"):
                data = output.get("data", {})
                if mime in data and not data.keys() & set(PICTURES):
                    return mime, output.data[mime]
        raise LookupError(f"{self.path.name}: cell {cell_id!r} has no output in words.")

    def tables(self, cell_id: str) -> list[tuple[str, str]]:
        """What a cell shows as tables: (Markdown above it, HTML with all rows)."""
        found, above = [], ""
        for output in self.cell(cell_id).get("outputs", []):
            data = output.get("data", {})
            made = re.findall(r"<table.*?</table>", data.get("text/html", ""), re.S)
            if made:  # of a table that folds, the one with all rows comes last
                found.append((above, made[-1]))
            above = data.get("text/markdown", "")
        if not found:
            raise LookupError(f"{self.path.name}: cell {cell_id!r} shows no table.")
        return found

    def reading(self, label: str) -> str:
        """What was seen in the published results, by label; without its figure."""
        body = self.cell(f"reading-{label}").source.partition("\n\n")[2]
        body = re.sub(r"^```\{.*?^```$", "", body, flags=re.M | re.S)
        body = re.sub(r"\{bdg-[\w-]+\}`([^`]*)`\s*", r"*\1*\n\n", body)  # the verdict
        return self.numbered(body.removesuffix("````").strip())

    def _labelled(self, pattern: str, label: str) -> re.Match[str]:
        wanted = re.compile(pattern.format(label=re.escape(label)), re.M | re.S)
        for cell in self.cells:
            found = wanted.search(cell.source) if cell.cell_type == "markdown" else None
            if found:
                return found
        raise LookupError(f"{self.path.name} has nothing labelled {label!r}.")


def _address(kind: str, data: str) -> str:
    return f"data:{kind};base64,{data}".replace("\n", "")


def _place(text: str, label: str) -> int | None:
    """Where a label stands in a text: `(label)` or `:label: label`."""
    found = re.search(
        rf"\({re.escape(label)}\)|:label: {re.escape(label)}$", text, re.M
    )
    return found.start() if found else None


@cache
def published(chapter: str) -> Chapter:
    """The published chapter of these two digits."""
    (path,) = PUBLISHED.glob(f"{chapter}-*.ipynb")
    return Chapter(path)
