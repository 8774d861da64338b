"""The index of methods names what there is, and all of it."""

import ast
import inspect
import pydoc
import re
from pathlib import Path

import drone
from drone.model import family
from drone.search.algorithm2 import METHODS

PAGE = (Path(__file__).parent.parent / "book" / "methods.md").read_text("utf-8")
CALLS = re.findall(r"`((?:compress|search_ranks)\(.*?\))`", PAGE)


def calls() -> list[ast.Call]:
    """Every call on the page, as Python reads it."""
    found = [ast.parse(text.replace("…", ""), mode="eval").body for text in CALLS]
    return [call for call in found if isinstance(call, ast.Call)]


def test_every_call_has_arguments_that_the_function_takes() -> None:
    assert len(calls()) > 12
    for call in calls():
        assert isinstance(call.func, ast.Name)
        function = getattr(drone, call.func.id)
        named = {keyword.arg: None for keyword in call.keywords if keyword.arg}
        inspect.signature(function).bind(*call.args, **named)


def test_all_of_the_family_and_every_search_is_listed() -> None:
    relatives = {
        name
        for name, value in vars(family).items()
        if inspect.isclass(value)
        and value.__module__ == family.__name__
        and hasattr(value, "inputs")
    } - {"Relative", "SVD", "DRONE"}  # the two have rows of their own
    given = {
        ast.unparse(keyword.value)
        for call in calls()
        for keyword in call.keywords
        if keyword.arg in ("relative", "method")
    }
    assert {text.removesuffix("()") for text in given if "(" in text} == relatives
    assert {ast.literal_eval(t) for t in given if "(" not in t} == {*METHODS} - {
        "drone"  # the default
    }


def test_every_dotted_name_is_there() -> None:
    names = re.findall(r"`(drone(?:\.\w+)+)`", PAGE)
    assert len(names) > 5
    for name in names:
        assert pydoc.locate(name) is not None, name
