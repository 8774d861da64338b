"""Give chapters the library's new names, published ones too, without running them.

    python book/rename.py        # after adding a line to book/renamed.yaml

A published chapter takes its source's code only if both are the same program once the
old names are replaced: the syntax trees are compared. Anything else is a new edition.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import nbformat
import yaml
from nbformat import NotebookNode
from publish import ROOT, store, with_prose, with_readings


def table(path: Path = ROOT / "book" / "renamed.yaml") -> dict[str, str]:
    """Read {old dotted name: new dotted name}.

    Raises:
        ValueError: the file is not such a table.
    """
    names = yaml.safe_load(path.read_text())
    if not isinstance(names, dict) or not all(map(_dotted, [*names, *names.values()])):
        raise ValueError(f"{path}: lines of `old.name: new.name` are needed.")
    return names


def _dotted(name: object) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"\w+(\.\w+)+", name))


def renamed(code: str, names: Mapping[str, str]) -> str:
    """Replace old names in Python code; comments and strings stay as they are."""
    lines = code.split("\n")
    found = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in names
    ]
    # From the end, so that what comes before keeps its place.
    for node in sorted(found, key=lambda n: (n.lineno, n.col_offset), reverse=True):
        # Columns count bytes of UTF-8.
        line = lines[node.lineno - 1].encode()
        if node.end_lineno != node.lineno or node.end_col_offset is None:
            raise ValueError(f"line {node.lineno}: a name over two lines; join them.")
        before, after = line[: node.col_offset], line[node.end_col_offset :]
        new = names[ast.unparse(node)].encode()
        lines[node.lineno - 1] = (before + new + after).decode()
    return "\n".join(lines)


def same_program(old: str, new: str, names: Mapping[str, str]) -> bool:
    """Whether two pieces of code differ in nothing but renamed names and layout."""
    return ast.dump(ast.parse(renamed(old, names))) == ast.dump(ast.parse(new))


def rename_source(notebook: NotebookNode, names: Mapping[str, str]) -> None:
    """Rename in the code and the text of a source notebook, in place."""
    words = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = renamed(cell.source, names)
        else:
            cell.source = words.sub(lambda m: names[m[1]], cell.source)


def take_names(
    published: NotebookNode, written: NotebookNode, names: Mapping[str, str]
) -> NotebookNode:
    """Give a published chapter its source's names and text; its results stay.

    Raises:
        ValueError: some code differs in more than the names; only a run can tell what
            that does. The message has the cell's number.
    """
    code = [c for c in written.cells if c.cell_type == "code"]
    ran = [
        c
        for c in published.cells
        if c.cell_type == "code"
        and "injected-parameters" not in c.metadata.get("tags", [])
    ]
    if len(code) != len(ran):
        raise ValueError(f"{len(ran)} code cells published, {len(code)} in the source.")
    for number, (old, new) in enumerate(zip(ran, code, strict=True), start=1):
        if not same_program(old.source, new.source, names):
            raise ValueError(f"code cell {number} differs in more than names.")
        old.source = new.source
    return with_prose(published, written)


def main() -> None:
    """Rename in every source, lay the code out, then in every published chapter."""
    names = table()
    sources = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in sources:
        notebook = nbformat.read(path, 4)
        rename_source(notebook, names)
        store(notebook, path)
    ruff = Path(sys.executable).with_name("ruff")
    subprocess.run([ruff, "format", "--quiet", *sources], check=True)
    for path in sources:
        target = ROOT / "book" / "chapters" / path.name
        try:
            new = take_names(nbformat.read(target, 4), nbformat.read(path, 4), names)
        except ValueError as error:
            raise SystemExit(f"{target.name}: {error} Run its edition.") from error
        store(with_readings(new, path), target)
        print(f"renamed: {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
