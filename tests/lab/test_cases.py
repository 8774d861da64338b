import json
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from drone.lab import cases
from drone.lab.cases import (
    case_key,
    case_path,
    keep_case,
    load_case,
    pack,
    read_cases,
    run_case,
    unpack,
)

SETTINGS = {"task": "rte", "seed": 0, "rate": 3e-5, "layers": [1, 2], "teacher": None}
FORK = multiprocessing.get_context("fork")

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


# --- keys ------------------------------------------------------------------------


def test_the_order_of_settings_does_not_matter() -> None:
    turned = dict(reversed(SETTINGS.items()))
    assert list(turned) != list(SETTINGS)
    assert case_key("dense", turned) == case_key("dense", SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_counts(name: str) -> None:
    assert case_key("dense", SETTINGS | {name: "other"}) != case_key("dense", SETTINGS)


def test_the_job_and_the_format_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = case_key("dense", SETTINGS)
    assert case_key("thin", SETTINGS) != before
    monkeypatch.setattr(cases, "FORMAT_VERSION", 99)
    assert case_key("dense", SETTINGS) != before


def test_a_depth_below_and_a_missing_name_count() -> None:
    keys = {
        case_key("a", {}),
        case_key("a", {"x": None}),
        case_key("a", {"x": {"y": 1}}),
        case_key("a", {"x": {"y": 2}}),
        case_key("a", {"x": 1}),
        case_key("a", {"x": "1"}),
        case_key("a", {"x": True}),
    }
    assert len(keys) == 7


@pytest.mark.parametrize("job", ["", "a/b", "..", "a b", "é", "a\n"])
def test_a_job_names_a_folder(job: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        case_key(job, {})


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"x": np.float32(1)}, r"settings\.x is a float32"),
        ({"x": [0, {"y": {1}}]}, r"settings\.x\[1\]\.y is a set"),
        ({"x": {3: 1}}, r"settings\.x has the name 3"),
        ({"x": torch.ones(1)}, r"settings\.x is a Tensor"),
        ({"x": Path("a")}, r"settings\.x is a "),
    ],
)
def test_what_json_does_not_know_is_refused(value: Any, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        case_key("dense", value)


# --- files -----------------------------------------------------------------------


@given(result=plain)
def test_a_result_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, result: Any
) -> None:
    folder = tmp_path_factory.mktemp("cases")
    kept = keep_case(folder, "dense", SETTINGS, result, 1.5)
    assert kept.result == result
    assert repr(load_case(folder, "dense", SETTINGS)) == repr(result)


def test_a_file_says_what_where_and_how_long(tmp_path: Path) -> None:
    case = keep_case(tmp_path, "dense", SETTINGS, {"score": 0.5}, 1.23456)
    assert case.path == case_path(tmp_path, "dense", SETTINGS)
    assert case.path.parent == tmp_path / "dense"
    assert case.path.name.endswith(f"-{case_key('dense', SETTINGS)[:12]}.json")
    assert "rte" in case.path.name
    assert case.settings == SETTINGS
    assert (case.job, case.seconds) == ("dense", 1.235)
    assert case.versions["torch"] == torch.__version__
    assert case.device
    assert case.date.endswith("+00:00")
    assert list(tmp_path.rglob("*")) == [case.path.parent, case.path]
    assert read_cases(tmp_path, "dense") == [case]
    assert read_cases(tmp_path, "other") == []


def test_nothing_there_is_none(tmp_path: Path) -> None:
    keep_case(tmp_path, "dense", SETTINGS, 1, 0.0)
    assert load_case(tmp_path, "dense", SETTINGS | {"seed": 1}) is None
    assert load_case(tmp_path, "thin", SETTINGS) is None


def test_a_finished_case_is_never_overwritten(tmp_path: Path) -> None:
    keep_case(tmp_path, "dense", SETTINGS, "first", 0.0)
    with pytest.raises(FileExistsError, match="never overwritten"):
        keep_case(tmp_path, "dense", SETTINGS, "second", 0.0)
    assert load_case(tmp_path, "dense", SETTINGS) == "first"


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), np.float64("-inf")])
def test_a_diverged_result_is_refused_by_its_path(tmp_path: Path, odd: float) -> None:
    result = {"epochs": [{"loss": 1.0}, {"loss": odd}]}
    with pytest.raises(ValueError, match=r"result\.epochs\[1\]\.loss is -?(nan|inf)"):
        keep_case(tmp_path, "dense", SETTINGS, result, 0.0)
    assert not list(tmp_path.rglob("*.json"))


def damage(path: Path, how: str) -> None:
    text = path.read_text()
    content = json.loads(text)
    if how == "half":
        path.write_text(text[: len(text) // 2])
    elif how == "empty":
        path.write_text("")
    elif how == "list":
        path.write_text("[]")
    elif how == "result":
        path.write_text(json.dumps(content | {"result": 0.99}))
    elif how == "settings":
        path.write_text(json.dumps(content | {"settings": {"seed": 5}}))
    elif how == "device":
        path.write_text(json.dumps(content | {"device": "a faster one"}))
    else:
        del content[how]
        path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "how",
    ["half", "empty", "list", "result", "settings", "device", "sha256", "versions"],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, how: str) -> None:
    path = keep_case(tmp_path, "dense", SETTINGS, 0.5, 0.0).path
    damage(path, how)

    def never(settings: Mapping[str, Any]) -> None:
        raise AssertionError("a damaged case is not run again unasked")

    for read in (
        lambda: load_case(tmp_path, "dense", SETTINGS),
        lambda: run_case(tmp_path, "dense", SETTINGS, never),
        lambda: read_cases(tmp_path, "dense"),
    ):
        with pytest.raises(ValueError, match=path.name):
            read()


def test_a_file_under_another_name_is_refused(tmp_path: Path) -> None:
    path = keep_case(tmp_path, "dense", SETTINGS, 0.5, 0.0).path
    other = case_path(tmp_path, "dense", SETTINGS | {"seed": 1})
    path.rename(other)
    with pytest.raises(ValueError, match="settings name it"):
        load_case(tmp_path, "dense", SETTINGS | {"seed": 1})


# --- runs ------------------------------------------------------------------------


def test_a_case_is_run_once(tmp_path: Path) -> None:
    calls = []

    def function(settings: Mapping[str, Any]) -> dict[str, Any]:
        calls.append(settings)
        return {"seed": settings["seed"]}

    first = run_case(tmp_path, "dense", SETTINGS, function)
    second = run_case(tmp_path, "dense", SETTINGS, function)
    assert (first.found, second.found, len(calls)) == (False, True, 1)
    assert first.result == second.result == {"seed": 0}


def test_a_case_that_failed_leaves_nothing_and_may_run_again(tmp_path: Path) -> None:
    def fails(settings: Mapping[str, Any]) -> None:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="luck"):
        run_case(tmp_path, "dense", SETTINGS, fails)
    assert not list(tmp_path.rglob("*.json"))
    assert run_case(tmp_path, "dense", SETTINGS, lambda _: 1).result == 1


def slow(settings: Mapping[str, Any]) -> int:
    Path(settings["log"], f"ran-{os.getpid()}").touch()
    time.sleep(settings["seconds"])
    return os.getpid()


def worker(folder: Path, settings: Mapping[str, Any]) -> None:
    run_case(folder, "slow", settings, slow)


def until(found: Any) -> None:
    for _ in range(500):
        if found():
            return
        time.sleep(0.01)
    raise AssertionError("not in five seconds")


def test_of_two_processes_one_runs_and_the_other_reads(tmp_path: Path) -> None:
    settings = {"log": str(tmp_path), "seconds": 0.3}
    both = [FORK.Process(target=worker, args=(tmp_path, settings)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(tmp_path.glob("ran-*"))) == 1
    assert load_case(tmp_path, "slow", settings) in [p.pid for p in both]


def test_a_killed_process_gives_its_case_back(tmp_path: Path) -> None:
    settings = {"log": str(tmp_path), "seconds": 0.3}
    first = FORK.Process(target=worker, args=(tmp_path, settings))
    first.start()
    until(lambda: list(tmp_path.glob("ran-*")))
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert load_case(tmp_path, "slow", settings) is None
    assert run_case(tmp_path, "slow", settings, slow).result == os.getpid()


# --- arrays ----------------------------------------------------------------------


@given(
    arrays(
        np.float16,
        array_shapes(min_dims=0, max_dims=3, min_side=0),
        elements=st.floats(width=16, allow_nan=False, allow_infinity=False),
    )
)
def test_float16_comes_back_bit_by_bit(array: np.ndarray) -> None:
    back = unpack(json.loads(json.dumps(pack(array))))
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


def test_what_is_stored_is_the_nearest_float16() -> None:
    tensor = torch.randn(7, 2) * 10
    assert (unpack(pack(tensor)) == tensor.half().numpy()).all()
    assert len(pack(tensor)["float16"]) <= 4 * -(-2 * tensor.numel() // 3)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e6, -7e4])
def test_what_float16_cannot_hold_is_refused_by_its_place(odd: float) -> None:
    array = np.zeros((2, 3))
    array[1, 2] = odd
    with pytest.raises(ValueError, match=r"number at \(1, 2\)"):
        pack(array)


def test_bytes_that_do_not_fit_the_shape_are_refused() -> None:
    packed = pack(np.ones(4))
    with pytest.raises(ValueError):
        unpack(packed | {"shape": [5]})
    with pytest.raises(ValueError):
        unpack(packed | {"float16": packed["float16"][:-3]})
