"""A chapter's parameters are checked before anything runs: names, types, ranges.

papermill takes a name the notebook does not know, and a text for a number, without a
word; a page with the default's results would then carry the wrong parameters. Names,
types and defaults are read from the notebook's own cell; ranges from a table.
"""

import ast
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

KINDS = {"int": int, "float": float, "str": str, "bool": bool}
KINDS |= {"list": list, "dict": dict}
Rule = Mapping[str, Any]


@dataclass(frozen=True)
class Declared:
    """One line of a parameters cell, such as `epochs: int = 1`."""

    kind: str
    default: Any


def declared(notebook: Path) -> dict[str, Declared]:
    """Read names, types and defaults from the cell tagged `parameters`.

    Raises:
        ValueError: there is no such cell, or a line that is not `name: type = value`
            with a type of KINDS and a value written out.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = [
        "".join(cell["source"])
        for cell in cells
        if "parameters" in cell["metadata"].get("tags", [])
    ]
    if len(texts) != 1:
        raise ValueError(f"{notebook}: {len(texts)} parameters cells; one is needed.")
    try:
        return parse(texts[0])
    except ValueError as error:
        raise ValueError(f"{notebook}, parameters, {error}") from error


def parse(text: str) -> dict[str, Declared]:
    """Read names, types and values from the lines of a parameters cell.

    Raises:
        ValueError: a line is not `name: type = value` (or `name = value`).
    """
    found = {}
    for line in ast.parse(text).body:
        try:
            name, kind, value = _assignment(line)
        except ValueError as error:
            raise ValueError(f"line {line.lineno}: {error}") from error
        found[name] = Declared(kind, value)
    return found


def _assignment(line: ast.stmt) -> tuple[str, str, Any]:
    if isinstance(line, ast.Assign) and len(line.targets) == 1:
        target, value = line.targets[0], ast.literal_eval(line.value)
        kind = type(value).__name__
    elif isinstance(line, ast.AnnAssign) and line.value is not None:
        target, value = line.target, ast.literal_eval(line.value)
        kind = ast.unparse(line.annotation)
    else:
        raise ValueError("`name: type = value` is needed.")
    if not isinstance(target, ast.Name) or kind not in KINDS:
        raise ValueError(f"a name and a type of {', '.join(KINDS)} are needed.")
    return target.id, kind, value


class _Loader(yaml.SafeLoader):
    """YAML as ever, but a name given twice is an error, not the last one's value."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    pairs = loader.construct_pairs(node, deep=True)
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice.")
    return dict(pairs)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def load(path: Path) -> dict[str, Any]:
    """Read a YAML file of names and their values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a mapping of names to values, or a name stands there
            twice; the message names the file.
    """
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(given, dict) or not all(isinstance(n, str) for n in given):
        raise ValueError(f"{path}: names and their values are needed.")
    return given


def ranges(path: Path, chapter: str) -> dict[str, Rule]:
    """Read the rules of one chapter: those of all, overruled by its own.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    table = load(path)
    rules: dict[str, Rule] = table.get("all", {}) | table.get(chapter, {})
    return rules


def check(notebook: Path, given: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Refuse parameters a notebook does not have, or cannot run with.

    Args:
        notebook: with its parameters cell.
        given: name → value, as papermill would get them.
        rules: {name: rule}, of a parameter or of a setting inside one. In a rule:
            `type`, `of` (choices), `least`, `most`, `above`, `below`, `length` (of a
            list), `filled` (not empty), `each` (a rule for a list's items or a dict's
            values), `also` (names a dict may have besides its default's), `free` (a
            dict's names are the user's, its values are settings).

    Raises:
        ValueError: all that is wrong, a line each, with the nearest name.
    """
    known = declared(notebook)
    wrong: list[str] = []
    for name, value in given.items():
        if name in known:
            rule = {"type": known[name].kind} | dict(rules.get(name, {}))
            wrong += _check(name, value, known[name].default, rule, rules)
        else:
            wrong.append(f"no parameter {name}{_nearest(name, known)}")
    if wrong:
        raise ValueError(
            f"{notebook.name} cannot run with these parameters:\n  "
            + "\n  ".join(wrong)
        )


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; is {near[0]} meant?"
    return f"; there are {', '.join(known)}."


def _check(
    where: str, value: Any, default: Any, rule: Rule, rules: Mapping[str, Rule]
) -> Iterator[str]:
    """Tell what is wrong with a value, and with what it holds."""
    kind = rule.get("type") or type(default).__name__
    if not _is(kind, value):
        hint = ""
        if kind == "float" and isinstance(value, str):
            hint = "; YAML reads 5e-5 as a text and 5.0e-5 as a number"
        if kind == "bool" and isinstance(value, str):
            hint = "; write true or false without quotes"
        found = type(value).__name__
        yield f"{where} is {value!r:.60}, a {found}; {kind} is needed{hint}."
        return
    yield from (f"{where} is {value!r:.60}; {said}." for said in _out_of(value, rule))
    each = rule.get("each")
    if isinstance(value, list):
        for number, item in enumerate(value):
            here = f"{where}[{number}]"
            if each:
                yield from _check(here, item, None, each, rules)
            elif isinstance(item, dict):
                yield from _settings(here, item, _entries(default), rule, rules)
    if isinstance(value, dict):
        for name, item in value.items():
            here = f"{where}.{name}"
            if each:
                yield from _check(here, item, None, each, rules)
            elif not rule.get("free"):
                yield from _settings(where, {name: item}, default or {}, rule, rules)
            elif isinstance(item, dict):
                entries = _entries(list(default.values()))
                yield from _settings(here, item, entries, rule, rules)
            else:
                yield f"{here} is {item!r:.60}; a dict of settings is needed."


def _entries(items: Any) -> dict[str, Any]:
    """Put the settings of all the default's entries into one dict."""
    together: dict[str, Any] = {}
    for item in items or []:
        if isinstance(item, dict):
            together |= item
    return together


def _settings(
    where: str,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    rule: Rule,
    rules: Mapping[str, Rule],
) -> Iterator[str]:
    """Check settings inside a parameter: each has its own rule, wherever it stands."""
    allowed = dict(defaults) | dict.fromkeys(rule.get("also", []))
    for name, value in given.items():
        here = f"{where}.{name}"
        if name not in allowed:
            yield f"{where} has no setting {name}{_nearest(str(name), allowed)}"
        elif allowed[name] is None and name not in rules:
            # A task's own settings, such as sst2: {epochs: 2}
            if isinstance(value, dict):
                yield from _settings(here, value, allowed, {}, rules)
            else:
                yield f"{here} is {value!r:.60}; a dict of settings is needed."
        else:
            own = rules.get(name, {})
            yield from _check(here, value, allowed[name], own, rules)


def _is(kind: str, value: Any) -> bool:
    """Whether a value is of a kind; True is no number, and 1 is a float too."""
    if isinstance(value, bool) and kind != "bool":
        return False
    wanted = (int, float) if kind == "float" else KINDS[kind]
    return isinstance(value, wanted)


def _out_of(value: Any, rule: Rule) -> Iterator[str]:
    """Tell which bounds a value is out of."""
    if isinstance(value, float) and not math.isfinite(value):
        yield "a finite number is needed"
        return
    if "of" in rule and value not in rule["of"]:
        yield f"one of {', '.join(map(str, rule['of']))} is needed"
    bounds = {
        "least": (lambda x, y: x >= y, "at least"),
        "most": (lambda x, y: x <= y, "at most"),
        "above": (lambda x, y: x > y, "above"),
        "below": (lambda x, y: x < y, "below"),
    }
    for name, (holds, said) in bounds.items():
        if name in rule and not holds(value, rule[name]):
            yield f"{said} {rule[name]} is needed"
    if rule.get("filled") and not value:
        yield "it must not be empty"
    if "length" in rule and len(value) != rule["length"]:
        yield f"{rule['length']} items are needed"
