"""Some rows and columns of a chapter's table, for a sheet or a slide."""

from typing import Any

from bs4 import BeautifulSoup

Element = Any  # of bs4, whose types let every child be missing


def chosen(
    text: str,
    groups: tuple[str, ...] = (),
    rows: tuple[str, ...] = (),
    columns: tuple[str, ...] = (),
) -> Element:
    """A table as an element, with what is named only; of what is empty, all."""
    table: Element = BeautifulSoup(text, "html.parser").table
    if table.caption:
        table.caption.string = table.caption.text.removesuffix(" All rows.")
    if groups:
        bodies = {name.parent.parent: name.text for name in table.select("tr.group th")}
        _expect("rows", groups, bodies.values())
        for body, name in bodies.items():
            if name not in groups:
                body.decompose()
    if rows:
        named = table.select("tbody tr:not(.group)")
        _expect("rows", rows, [row.th.text for row in named])
        for row in named:
            if row.th.text not in rows:
                row.decompose()
    if columns:
        head = table.select_one("thead tr").select("th")[1:]
        _expect("columns", columns, [name.text for name in head])
        dropped = [at for at, name in enumerate(head, 1) if name.text not in columns]
        for row in table.select("tr:not(.group)"):
            cells = row.select("th, td")
            for at in dropped:
                cells[at].decompose()
    return table


def _expect(kind: str, wanted: tuple[str, ...], there: Any) -> None:
    missing = set(wanted) - set(there)
    if missing:
        raise LookupError(f"no {kind} {sorted(missing)}; there are {list(there)}.")
