"""The questions of a chapter: read from YAML, their numbers computed.

A question that has a number in its answer says in `compute` how the number comes about,
and its texts quote the variables of that code as `<<name>>`. Wrong numbers come from
the same code: each is what a named mistake gives.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "quizzes"
PLACEHOLDER = re.compile(r"<<(\w+)>>")
# A choice that says a number says it through code: 4, 0.5, 1,536, 33 %, 2×, 2.3×.
TYPED_NUMBER = re.compile(r"[\d.,\s]*\d[\d.,\s]*(%|×|times)?\.?")


@dataclass(frozen=True)
class Choice:
    """One answer, and why it is right or wrong."""

    text: str
    why: str
    right: bool


@dataclass(frozen=True)
class Question:
    """What is asked, and the answers in the order in which they are shown."""

    key: str
    ask: str
    about: str  # a label or a cell id of the chapter
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Quiz:
    """The questions of one chapter."""

    chapter: str  # two digits
    title: str
    questions: tuple[Question, ...]


def load(chapter: str, folder: Path = FOLDER) -> Quiz:
    """The quiz of a chapter, given by its two digits."""
    path = folder / f"{chapter}.yaml"
    source = yaml.safe_load(path.read_text(encoding="utf-8"))
    order = random.Random(chapter)  # always the same order, not the right one first
    questions = tuple(_question(q, path.name, order) for q in source["questions"])
    keys = [question.key for question in questions]
    if len(keys) != len(set(keys)):
        raise ValueError(f"{path.name}: two questions have the same id.")
    return Quiz(chapter, source["title"], questions)


def chapters(folder: Path = FOLDER) -> list[str]:
    """Two digits of each chapter that has a quiz."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _question(source: dict[str, Any], file: str, order: random.Random) -> Question:
    where = f"{file}, question {source.get('id', '?')!r}"
    known = {"id", "ask", "about", "compute", "right", "wrong"}
    missing = known - {"compute"} - source.keys()
    if missing or source.keys() - known:
        raise ValueError(
            f"{where}: needs id, about, ask, right and wrong, may have compute; "
            f"missing {sorted(missing)}, unknown {sorted(source.keys() - known)}."
        )
    values: dict[str, Any] = {}
    exec(source.get("compute", ""), values)  # the book's own code, beside the question
    choices = [_choice(source["right"], values, True, where)]
    choices += [_choice(wrong, values, False, where) for wrong in source["wrong"]]
    if len(choices) < 3:
        raise ValueError(f"{where}: needs at least two wrong answers.")
    if len({choice.text for choice in choices}) < len(choices):
        raise ValueError(f"{where}: two answers read the same.")
    order.shuffle(choices)
    ask = _filled(source["ask"], values, where)
    return Question(source["id"], ask, source["about"], tuple(choices))


def _choice(
    source: dict[str, str], values: dict[str, Any], right: bool, where: str
) -> Choice:
    if source.keys() != {"text", "why"}:
        raise ValueError(f"{where}: an answer has a text and a why, not {source!r}.")
    if TYPED_NUMBER.fullmatch(source["text"].strip()):
        raise ValueError(
            f"{where}: the number {source['text']!r} is typed; compute it and quote "
            "it as <<name>>."
        )
    text, why = (_filled(source[part], values, where) for part in ("text", "why"))
    return Choice(text, why, right)


def _filled(text: str, values: dict[str, Any], where: str) -> str:
    """The text with each <<name>> replaced by the value of that name."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"{where}: compute sets no {match[1]!r}.")
        return str(values[match[1]])

    return PLACEHOLDER.sub(value, text).strip()
