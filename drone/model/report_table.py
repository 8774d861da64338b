"""The table of `report`: a DataFrame that prints in 80 columns, with totals."""

import textwrap
from typing import Any

import pandas as pd

WIDTH = 80
NAME = 38  # characters of a module's name; its end says most
ROWS = 12  # printed at most: a report on BERT-base has 75
NOTES = 3


class Report(pd.DataFrame):
    """One row a layer, and the totals of the whole model. Slices are plain tables.

    Attributes:
        totals: {`parameters`, `parameters_dense`}: each tensor counted once.
    """

    _metadata = ["totals"]  # noqa: RUF012  # how pandas takes an attribute
    totals: dict[str, int]

    def __repr__(self) -> str:
        """Print the columns that matter, notes that are not usual, and the totals."""
        columns = f"{'out×in':>11} {'rank':>5} {'parameters':>11} {'left':>7}"
        lines = [f"{'':{NAME}} {columns}"]
        rows = [_line(str(name), row) for name, row in self.iterrows()]
        hidden = len(rows) - ROWS
        if hidden > 0:
            half = ROWS // 2
            more = f"… {hidden} more rows: to_string() shows all"
            rows = [*rows[:half], more, *rows[-half:]]
        notes = [
            f"{name}: {note}"
            for name, note in self["note"].items()
            if note != "replaced" and not note.startswith(("left dense: no rank was ",))
        ]
        told = [
            line
            for note in notes[:NOTES]
            for line in textwrap.wrap(note, WIDTH, subsequent_indent="  ")
        ]
        if len(notes) > NOTES:
            told.append(f"… {len(notes) - NOTES} more notes in the column `note`")
        return "\n".join([*lines, *rows, *told, self.summary()])

    def summary(self) -> str:
        """Say in a line what the whole model was and is."""
        now, dense = self.totals["parameters"], self.totals["parameters_dense"]
        replaced = int(self["rank"].notna().sum())
        share = f"{100 * now / dense:.1f} %" if dense else "-"
        return (
            f"{replaced} of {len(self)} layers replaced; whole model: {dense:,} → "
            f"{now:,} parameters, {share}"
        )

    def _repr_html_(self) -> str:
        """Show what pandas shows, and the totals under it, in a notebook."""
        table = pd.DataFrame(self).to_html(max_rows=ROWS)
        return f"{table}<p>{self.summary()}</p>"


def _line(name: str, row: "pd.Series[Any]") -> str:
    short = name if len(name) <= NAME else f"…{name[1 - NAME :]}"
    rank = "dense" if pd.isna(row["rank"]) else str(row["rank"])
    parameters, dense = int(str(row["parameters"])), int(str(row["parameters_dense"]))
    shape = f"{row['out']}×{row['in']}"
    left = f"{100 * parameters / dense:.1f} %"
    return f"{short:{NAME}} {shape:>11} {rank:>5} {parameters:>11,} {left:>7}"
