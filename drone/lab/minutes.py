"""How long a chapter takes to read, code included, told by the chapter itself.

Exercises, solutions and folded cells are left out; they take as long as one likes.
"""

import re
from dataclasses import dataclass

from nbformat import NotebookNode

WORDS = 80  # a minute, of text with formulas in it
LINES = 8  # a minute, of code that one has not seen before
PROOF = 5  # minutes, with a pencil
FOLDED = {"hide-input", "remove-cell", "remove-input", "hide-cell"}
TOLD = re.compile(
    r"About \d+ minutes: [\d,]+ words,\s+\d+ lines of code,\s+\d+ proofs?\."
)
# Markup, and what is read in one glance: a formula counts as a word.
MARKUP = re.compile(r"\$\$.*?\$\$(?: \(\S+\))?|\$[^$]*\$", re.DOTALL)


@dataclass(frozen=True)
class Reading:
    """What there is to read in a chapter, and how many minutes that is."""

    words: int
    lines: int
    proofs: int

    @property
    def minutes(self) -> int:
        """At the rates of this module, rounded to five."""
        exact = self.words / WORDS + self.lines / LINES + PROOF * self.proofs
        return 5 * round(exact / 5)

    def __str__(self) -> str:
        """Say it as the chapter does."""
        proofs = f"{self.proofs} proof" + "s" * (self.proofs != 1)
        return (
            f"About {self.minutes} minutes: {self.words:,} words, "
            f"{self.lines} lines of code, {proofs}."
        )


def count(notebook: NotebookNode) -> Reading:
    """Count what a chapter shows openly, up to its exercises."""
    words = lines = proofs = 0
    for cell in notebook.cells:
        if "## Exercises" in cell.source:
            break
        if cell.cell_type == "markdown":
            text = TOLD.sub("", cell.source)
            proofs += text.count("{prf:proof}")
            words += len(MARKUP.sub(" formula ", text).split())
        elif not FOLDED & set(cell.metadata.get("tags", [])):
            lines += sum(bool(line.strip()) for line in cell.source.splitlines())
    return Reading(words, lines, proofs)
