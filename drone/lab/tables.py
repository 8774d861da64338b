"""Every table of results of the book, made by one function.

Numbers stand right-aligned with one decimal, an interval in the cell of its number,
rows in groups, the best of each group in bold, what has failed marked; the rows that
decide are shown, the others folded. The look is the site's style sheet's; read
elsewhere, a notebook shows the same as plain text.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from math import isnan

SHOWN = 5  # rows before the fold


def number(value: float, spec: str) -> str:
    """Write a number; one that rounds to zero from below is zero and has no minus.

    >>> number(-0.04, ".1f"), number(-0.04, "+.1%"), number(-0.06, ".1f")
    ('0.0', '-4.0%', '-0.1')
    """
    text = f"{value:{spec}}"
    is_zero = "0" in text and not any(digit in text for digit in "123456789")
    return f"{abs(value):{spec}}" if is_zero else text


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    >>> f"{Estimate(79.42, -1.5, 3.9)}"
    '79.4 [-1.5, 3.9]'
    """

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Format all three numbers alike; one decimal unless told."""
        value, low, high = (
            number(x, spec or ".1f") for x in (self.value, self.low, self.high)
        )
        return f"{value} [{low}, {high}]"


Cell = float | Estimate | str | None


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: of the model or setting, in words.
        cells: a number, a number with its interval, a text, or None: nothing to say.
        group: rows of one group stand together under its name.
        reference: what others are compared with (the dense model, the majority
            class): in italics, and never the best.
        failed: no better than a model that has learnt nothing.
        folded: shown only when the reader unfolds the whole table.
    """

    name: str
    cells: Sequence[Cell]
    group: str = ""
    reference: bool = False
    failed: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Table:
    """A table of results: what a cell displays, as HTML and as plain text.

    Attributes:
        caption: states the finding or what is listed, in a sentence.
        columns: their names; the first is that of the rows' names.
        rows: in the order shown; those of a group are brought together.
        best: {column: "max" or "min"}, where the best of each group is bold.
        formats: {column: format of its numbers}; one decimal otherwise.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]
    best: Mapping[str, str]
    formats: Mapping[str, str]

    def cells(self, row: Row) -> list[str]:
        """Write the cells of a row."""
        named = zip(self.columns[1:], row.cells, strict=True)
        return [_written(cell, self.formats.get(name, ".1f")) for name, cell in named]

    def text(self) -> str:
        """Return the table as plain text, all rows; the best have a star."""
        lines = [list(self.columns)]
        for group, rows in _grouped(self.rows):
            if group:
                lines.append([group, *[""] * (len(self.columns) - 1)])
            for row in rows:
                marks = _best(self, rows, row)
                written = zip(self.cells(row), marks, strict=True)
                cells = [f"{cell}*" if mark else cell for cell, mark in written]
                name = f"  {row.name}" if group else row.name
                name += " (failed)" if row.failed else ""
                lines.append([name, *cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        body = [
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.caption, *body])

    def html(self) -> str:
        """Return the table as HTML: a few rows, and all of them folded beneath."""
        shown = [row for row in self.rows if not row.folded]
        if len(shown) == len(self.rows):
            return self._html(self.rows)
        rest = replace(self, caption=f"{self.caption} All rows.")._html(self.rows)
        return (
            self._html(shown) + '\n<details class="results-all">'
            f"<summary>All {len(self.rows)} rows</summary>\n{rest}\n</details>"
        )

    def _html(self, rows: Sequence[Row]) -> str:
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in self.columns)
        bodies = []
        for group, members in _grouped(rows):
            lines = []
            if group:
                lines.append(
                    f'<tr class="group"><th scope="rowgroup" '
                    f'colspan="{len(self.columns)}">{escape(group)}</th></tr>'
                )
            # the best of all rows of the group, also of those that are folded
            rivals = [row for row in self.rows if row.group == group]
            lines += [_html_row(self, rivals, row) for row in members]
            bodies.append("<tbody>\n" + "\n".join(lines) + "\n</tbody>\n")
        return (
            '<div class="results-scroll" tabindex="0" role="region" '
            f'aria-label="{escape(self.caption)}">\n'
            f'<table class="results">\n<caption>{escape(self.caption)}</caption>\n'
            f"<thead><tr>{head}</tr></thead>\n{''.join(bodies)}</table></div>"
        )

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        """What Jupyter shows, and what it falls back to."""
        return {"text/html": self.html(), "text/plain": self.text()}


def table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Row],
    *,
    best: Mapping[str, str] | None = None,
    formats: Mapping[str, str] | None = None,
    shown: int = SHOWN,
) -> Table:
    """Make a table of results; a cell that ends with it shows it.

    Args:
        caption: states the finding or what is listed, in a sentence.
        columns: their names; the first is that of the rows' names.
        rows: in the order shown. Where none says that it is folded and there are more
            than `shown`, the first `shown` are shown.
        best: {column: "max" or "min"}, where the best of each group is bold.
        formats: {column: format of its numbers, such as ".2f"}.
        shown: rows before the fold.

    Raises:
        ValueError: no caption, no rows, a row with another number of cells, or a
            column in `best` or `formats` that is not there.

    >>> print(table("DRONE loses least.", ["model", "points"],
    ...       [Row("SVD", [71.9]), Row("DRONE", [77.0])],
    ...       best={"points": "max"}).text())
    DRONE loses least.
    model  points
    SVD      71.9
    DRONE   77.0*
    """
    rows, best, formats = list(rows), dict(best or {}), dict(formats or {})
    if not caption.strip() or not rows:
        raise ValueError(f"caption {caption!r}, {len(rows)} rows; both are needed.")
    for row in rows:
        if len(row.cells) != len(columns) - 1:
            raise ValueError(
                f"row {row.name!r} has {len(row.cells)} cells; {len(columns) - 1}, one "
                "for each column but the first, are needed."
            )
    unknown = (best.keys() | formats.keys()) - set(columns[1:])
    if unknown or not set(best.values()) <= {"max", "min"}:
        raise ValueError(
            f"best={best}, formats={formats}: columns of {list(columns[1:])} are "
            "needed, and 'max' or 'min' for the best."
        )
    if not any(row.folded for row in rows):
        rows = [replace(row, folded=i >= shown) for i, row in enumerate(rows)]
    return Table(caption, columns, rows, best, formats)


def _written(cell: Cell, spec: str) -> str:
    if cell is None or (isinstance(cell, float) and isnan(cell)):
        return "–"
    if isinstance(cell, str):
        return cell
    return f"{cell:{spec}}" if isinstance(cell, Estimate) else number(cell, spec)


def _grouped(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return list(groups.items())


def _best(made: Table, rivals: Sequence[Row], row: Row) -> list[bool]:
    """Say for each cell of a row whether it is the best of its group, as written."""
    marks = []
    for place, name in enumerate(made.columns[1:]):
        if name not in made.best or row.reference or _value(row.cells[place]) is None:
            marks.append(False)
            continue
        # compared as they are read: what looks equal is equally good
        spec = made.formats.get(name, ".1f")
        found = [
            float(f"{value:{spec}}")
            for other in (row, *rivals)
            if not other.reference and (value := _value(other.cells[place])) is not None
        ]
        wanted = max(found) if made.best[name] == "max" else min(found)
        marks.append(found[0] == wanted)
    return marks


def _value(cell: Cell) -> float | None:
    """The number of a cell, if it has one."""
    number = cell.value if isinstance(cell, Estimate) else cell
    if number is None or isinstance(number, str) or isnan(number):
        return None
    return float(number)


def _html_row(made: Table, rivals: Sequence[Row], row: Row) -> str:
    told = {"reference": row.reference, "failed": row.failed}
    kind = " ".join(name for name, is_so in told.items() if is_so)
    marks = _best(made, rivals, row)
    written = zip(made.cells(row), marks, strict=True)
    cells = "".join(
        f'<td class="best">{_minus(cell)}</td>' if mark else f"<td>{_minus(cell)}</td>"
        for cell, mark in written
    )
    attribute = f' class="{kind}"' if kind else ""
    return f'<tr{attribute}><th scope="row">{escape(row.name)}</th>{cells}</tr>'


def _minus(cell: str) -> str:
    """A minus is as wide as a digit, so that the figures stand under each other."""
    return escape(cell).replace("-", "−")
